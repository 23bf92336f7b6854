//! The page of measurements beside a prediction: one section a file, the same rows as the Markdown.

use crate::analysis::predicted::{Beside, Side};
use crate::report::predicted::{
    CEILING_TITLES, RULE, TIME_TITLES, ceiling_cells, facts, notes, time_cells, title, verdict,
};

use super::content::{Block, Page, RecordHead, Section, Table};
use super::lay_out;

/// # Errors
/// When the template does not fit the page, which no file can cause.
pub fn page(beside: &Beside) -> anyhow::Result<String> {
    let unmeasured = |side: &Side| {
        let reason = side.not_a_measurement.as_ref()?;
        Some(format!("{}: NOT A MEASUREMENT: {reason}", side.file))
    };
    lay_out(&Page {
        program: "tokmeter report --predicted",
        title: "Measured beside predicted".to_owned(),
        tone: "",
        style: include_str!("style.css"),
        version: env!("CARGO_PKG_VERSION"),
        origin: "the prediction and the files below; every number is in them or follows from them by METHODOLOGY.md",
        warnings: beside.sides.iter().filter_map(unmeasured).collect(),
        lead: vec![RULE.to_owned()],
        records: vec![RecordHead {
            swatch: String::new(),
            name: "Prediction".to_owned(),
            facts: facts(beside),
        }],
        sections: vec![Section {
            id: "predicted",
            title: "Files",
            blocks: beside.sides.iter().flat_map(blocks).collect(),
        }],
    })
}

fn blocks(side: &Side) -> Vec<Block> {
    let mut blocks = vec![Block::Heading { text: title(side) }, Block::text(verdict(side))];
    let times: Vec<Vec<String>> = side.rows.iter().map(time_cells).collect();
    let ceilings: Vec<Vec<String>> = side.ceilings.iter().map(ceiling_cells).collect();
    for (caption, titles, rows) in [
        ("Times", &TIME_TITLES[..], times),
        ("Ceilings that the prediction assumed", &CEILING_TITLES[..], ceilings),
    ] {
        if !rows.is_empty() {
            blocks.push(Block::Table(Table {
                caption: caption.to_owned(),
                columns: titles.iter().map(|title| (*title).to_owned()).collect(),
                rows,
                is_text: false,
                is_folded: false,
            }));
        }
    }
    let notes = notes(side);
    if !notes.is_empty() {
        blocks.push(Block::Bullets { items: notes });
    }
    blocks
}
