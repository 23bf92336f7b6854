//! What a page consists of, before it is HTML: sections of texts, charts and tables. The template alone knows tags.

use serde::Serialize;

/// The whole page.
#[derive(Debug, Serialize)]
pub(super) struct Page {
    /// The command that makes such pages.
    pub(super) program: &'static str,
    pub(super) title: String,
    /// Class of the title in the style sheet; none where nothing was judged.
    pub(super) tone: &'static str,
    pub(super) style: &'static str,
    pub(super) version: &'static str,
    /// What the numbers come from.
    pub(super) origin: &'static str,
    /// What nobody may overlook.
    pub(super) warnings: Vec<String>,
    /// What stands under the title, most important first.
    pub(super) lead: Vec<String>,
    pub(super) records: Vec<RecordHead>,
    pub(super) sections: Vec<Section>,
}

/// A record, a side of a comparison, or the subject of a plan, as the legend of the page names it.
#[derive(Debug, Serialize)]
pub(super) struct RecordHead {
    /// Finished markup.
    pub(super) swatch: String,
    pub(super) name: String,
    pub(super) facts: Vec<(&'static str, String)>,
}

#[derive(Debug, Serialize)]
pub(super) struct Section {
    pub(super) id: &'static str,
    pub(super) title: &'static str,
    pub(super) blocks: Vec<Block>,
}

#[derive(Debug, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub(super) enum Block {
    Text {
        text: String,
    },
    Heading {
        text: String,
    },
    Bullets {
        items: Vec<String>,
    },
    /// Closed until asked for.
    Formulas {
        caption: String,
        items: Vec<String>,
    },
    Charts {
        charts: Vec<Figure>,
    },
    Table(Table),
    Facts {
        groups: Vec<FactGroup>,
    },
}

impl Block {
    pub(super) fn text(text: impl Into<String>) -> Block {
        Block::Text { text: text.into() }
    }
}

/// A chart with what belongs to it.
#[derive(Debug, Serialize)]
pub(super) struct Figure {
    pub(super) title: String,
    /// Finished markup.
    pub(super) svg: String,
    pub(super) legend: Vec<LegendEntry>,
    pub(super) note: String,
}

#[derive(Debug, Serialize)]
pub(super) struct LegendEntry {
    /// Finished markup.
    pub(super) swatch: String,
    pub(super) text: String,
}

#[derive(Debug, Default, Serialize)]
pub(super) struct Table {
    pub(super) caption: String,
    pub(super) columns: Vec<String>,
    /// The first cell heads its row.
    pub(super) rows: Vec<Vec<String>>,
    /// Columns after the first hold texts, not numbers.
    pub(super) is_text: bool,
    /// Closed until asked for.
    pub(super) is_folded: bool,
}

/// Facts of one part of the records.
#[derive(Debug, Serialize)]
pub(super) struct FactGroup {
    pub(super) title: String,
    pub(super) facts: Vec<Fact>,
}

/// One field over all records.
#[derive(Debug, PartialEq, Serialize)]
pub(super) struct Fact {
    pub(super) name: String,
    /// Each different value once, and the numbers of the records that have it; no numbers where all have the same.
    pub(super) values: Vec<(String, String)>,
}
