//! The records of a page: how each is called, and its cells in the groups that are drawn as lines.

use rayon::prelude::*;

use crate::analysis::curves::{CellKind, Place};
use crate::analysis::{CellSummary, Summary, summarize};
use crate::record::{Cell, Record};

use super::chart::Line;
use super::content::LegendEntry;
use super::look::{DASHES, Look, dash_swatch};

/// One record of the page.
pub(super) struct Subject<'a> {
    pub(super) record: &'a Record,
    pub(super) summary: Summary,
    /// Counts from 1.
    pub(super) number: usize,
    /// Device, driver and session.
    pub(super) name: String,
}

impl<'a> Subject<'a> {
    pub(super) fn all(records: &'a [Record]) -> Vec<Subject<'a>> {
        let subject = |(index, record): (usize, &'a Record)| Subject {
            record,
            summary: summarize(record),
            number: index + 1,
            name: name(record),
        };
        records.par_iter().enumerate().map(subject).collect()
    }

    pub(super) fn cells(&self) -> impl Iterator<Item = (&Cell, &CellSummary)> {
        self.record.cells.iter().zip(&self.summary.cells)
    }

    /// `#2 device · driver · label`
    pub(super) fn title(&self) -> String {
        format!("#{} {}", self.number, self.name)
    }

    pub(super) fn look(&self) -> Look {
        Look::new(self.number - 1, 0)
    }
}

/// Device · driver · session.
fn name(record: &Record) -> String {
    let gpu = record.machine.gpus.iter().find(|gpu| format!("cuda:{}", gpu.index) == record.engine.device);
    let mut parts = vec![match gpu {
        Some(gpu) => gpu.name.value().cloned().unwrap_or_else(|| record.engine.device.clone()),
        None if record.engine.device == "cpu" => {
            record.machine.cpu.model.value().cloned().unwrap_or_else(|| "CPU".to_owned())
        }
        None => record.engine.device.clone(),
    }];
    if gpu.is_some() {
        let driver = record.machine.gpu_driver.version.value();
        parts.push(driver.map_or("driver unknown".to_owned(), |driver| format!("driver {driver}")));
    }
    parts.push(match record.session.label.value() {
        Some(label) => label.clone(),
        None => record.started_at.chars().take(16).collect::<String>().replace('T', " "),
    });
    parts.push(record.engine.compute_dtype.clone());
    parts.join(" · ")
}

/// Names of the models, in the order of the records.
pub(super) fn models(subjects: &[Subject<'_>]) -> Vec<String> {
    let mut models: Vec<String> = Vec::new();
    for subject in subjects {
        if !models.contains(&subject.record.model.name) {
            models.push(subject.record.model.name.clone());
        }
    }
    models
}

/// ` · model` where the page has several.
pub(super) fn of_model(subjects: &[Subject<'_>], model: &str) -> String {
    if models(subjects).len() > 1 { format!(" · {model}") } else { String::new() }
}

/// What the cells of a line share, apart from the record.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Along {
    /// The line runs over the load; context and output length are fixed.
    Load,
    /// The line runs over the context; load and output length are fixed.
    Context,
}

/// Cells of one record that make one line.
pub(super) struct Group<'a> {
    pub(super) subject: &'a Subject<'a>,
    pub(super) cells: Vec<(Place, &'a Cell, &'a CellSummary)>,
    pub(super) look: Look,
}

/// Which records, and which lines of each, a chart draws, and how. Where several records meet, colour and marker say the
/// record and the dash says the line; a single record spends all three on its lines.
pub(super) struct Selection<'a> {
    pub(super) subjects: Vec<&'a Subject<'a>>,
    /// Names of the lines.
    pub(super) names: Vec<String>,
    pub(super) note: String,
}

/// Lines of a chart with one record; more hide each other.
const MOST_LINES: usize = 8;
/// Records of a chart.
const MOST_RECORDS: usize = 8;

impl<'a> Selection<'a> {
    /// Of the given records and lines as many as a chart can hold, evenly spread from the first to the last.
    pub(super) fn new(subjects: Vec<&'a Subject<'a>>, names: Vec<String>) -> Selection<'a> {
        let most = if subjects.len() > 1 { DASHES } else { MOST_LINES };
        let (names, of_lines) = thinned(names, most, "lines");
        let (subjects, of_records) = thinned(subjects, MOST_RECORDS, "records");
        let notes: Vec<String> = [of_records, of_lines].into_iter().filter(|note| !note.is_empty()).collect();
        let note = if notes.is_empty() {
            String::new()
        } else {
            format!("Drawn: {}. The tables have all values.", notes.join(", "))
        };
        Selection { subjects, names, note }
    }

    fn is_of_several(&self) -> bool {
        self.subjects.len() > 1
    }

    pub(super) fn look(&self, subject: &Subject<'_>, line: usize) -> Look {
        Look::new(if self.is_of_several() { subject.number - 1 } else { line }, line)
    }

    /// The records and the lines, each once.
    pub(super) fn legend(&self) -> Vec<LegendEntry> {
        let lines = self.names.iter().enumerate();
        if !self.is_of_several() {
            let entry = |(line, name): (usize, &String)| LegendEntry {
                swatch: Look::new(line, line).swatch(),
                text: name.clone(),
            };
            return lines.map(entry).collect();
        }
        let records = self
            .subjects
            .iter()
            .map(|subject| LegendEntry { swatch: subject.look().swatch(), text: subject.title() });
        let dashes = lines.map(|(line, name)| LegendEntry { swatch: dash_swatch(line), text: name.clone() });
        // A single dash says nothing.
        let dashes = dashes.filter(|_| self.names.len() > 1);
        records.chain(dashes).collect()
    }
}

/// At most `most` of `all`, evenly spread from the first to the last, and what to say about it.
pub(super) fn thinned<T>(all: Vec<T>, most: usize, what: &str) -> (Vec<T>, String) {
    let count = all.len();
    if count <= most {
        return (all, String::new());
    }
    let kept: Vec<usize> = (0..most).map(|index| index * (count - 1) / (most - 1)).collect();
    let items = all.into_iter().enumerate().filter(|(index, _)| kept.contains(index)).map(|(_, item)| item);
    (items.collect(), format!("{most} of {count} {what}"))
}

/// The cells of one model and kind as lines.
pub(super) fn groups<'a>(
    subjects: &'a [Subject<'a>],
    model: &str,
    kind: CellKind,
    along: Along,
) -> (Selection<'a>, Vec<Group<'a>>) {
    let is_here = |subject: &&Subject<'_>| {
        subject.record.model.name == model
            && subject.record.cells.iter().any(|cell| Place::of(&cell.workload).kind == kind)
    };
    let here: Vec<&Subject<'_>> = subjects.iter().filter(is_here).collect();
    let places = here.iter().flat_map(|subject| &subject.record.cells).map(|cell| Place::of(&cell.workload));
    let mut fixed: Vec<(f64, u32)> =
        places.filter(|place| place.kind == kind).map(|place| fixed_of(along, &place)).collect();
    fixed.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
    fixed.dedup();
    let names = fixed.iter().map(|fixed| group_name(kind, along, *fixed)).collect();
    let selection = Selection::new(here, names);
    let mut groups = Vec::new();
    for subject in &selection.subjects {
        for (line, name) in selection.names.iter().enumerate() {
            let is_of_line = |place: &Place| {
                place.kind == kind && group_name(kind, along, fixed_of(along, place)) == *name
            };
            let cells = subject.cells().map(|(cell, summary)| (Place::of(&cell.workload), cell, summary));
            let mut cells: Vec<_> = cells.filter(|(place, _, _)| is_of_line(place)).collect();
            cells.sort_by(|(a, _, _), (b, _, _)| a.load.total_cmp(&b.load).then(a.context.cmp(&b.context)));
            if !cells.is_empty() {
                groups.push(Group { subject, cells, look: selection.look(subject, line) });
            }
        }
    }
    (selection, groups)
}

/// What all cells of a line have in common.
fn fixed_of(along: Along, place: &Place) -> (f64, u32) {
    match along {
        Along::Load => (f64::from(place.context), place.osl),
        Along::Context => (place.load, place.osl),
    }
}

fn group_name(kind: CellKind, along: Along, (fixed, osl): (f64, u32)) -> String {
    let fixed = match (along, kind) {
        (Along::Load, CellKind::Decode) => format!("depth {fixed}"),
        (Along::Load, _) => format!("ISL {fixed}"),
        (Along::Context, CellKind::ServeClosed) => format!("concurrency {fixed}"),
        (Along::Context, CellKind::ServeOpen) => format!("{fixed} requests/s"),
        (Along::Context, _) => format!("batch {fixed}"),
    };
    if osl > 0 { format!("{fixed}, OSL {osl}") } else { fixed }
}

/// Whether lines carry anything to draw.
pub(super) fn has_points(lines: &[Line]) -> bool {
    lines.iter().any(|line| !line.points.is_empty())
}
