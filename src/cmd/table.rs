//! Tables without lines that verbs print: as wide as what is in them, and trimmed at the end of each line.

use comfy_table::{CellAlignment, ContentArrangement, Table, presets};

pub(super) fn plain(titles: &[&str], right_aligned: impl IntoIterator<Item = usize>) -> Table {
    let mut table = Table::new();
    table
        .load_style(presets::NOTHING)
        .set_content_arrangement(ContentArrangement::Disabled)
        .set_header(titles.to_vec());
    for column in right_aligned {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table
}

pub(super) fn lines(table: &Table) -> impl Iterator<Item = String> {
    table.lines().map(|line| line.trim_end().to_owned())
}

pub(super) fn text(table: &Table) -> String {
    lines(table).collect::<Vec<_>>().join("\n")
}
