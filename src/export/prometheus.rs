//! Gauges and summaries in Prometheus' text format 0.0.4, for the textfile collector of node_exporter or a push gateway.
//! Base units: seconds, watts, joules, ratios. No timestamps, which the textfile collector refuses: the record's own start
//! is a gauge.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use super::windows::{Sums, is_measured};
use super::{About, Exported, Refusal, Source, subject};
use crate::analysis::{CellSummary, Quantiles, TokenKind, summarize};
use crate::record::{Cell, Maybe};

pub(super) const ABOUT: About = About {
    name: "prometheus",
    made_from: "records",
    consumer: "text format 0.0.4: node_exporter's textfile collector, a push gateway, any scraper",
    source: "prometheus_client 0.26.0 (its parser); prometheus.io, exposition formats",
    settings: &[],
    fields: &[
        (
            "tokmeter_record_info",
            "always 1; labels: file, driver, tool version, weights, whether it is a measurement",
        ),
        ("tokmeter_record_started_timestamp_seconds", "started_at, seconds since 1970"),
        ("tokmeter_measured_seconds", "all windows of the cell together"),
        (
            "tokmeter_input_tokens_per_second",
            "prompt tokens over the windows' time; absent where none were computed",
        ),
        ("tokmeter_output_tokens_per_second", "output tokens over the windows' time"),
        (
            "tokmeter_time_to_first_token_seconds",
            "summary of TTFT: quantiles 0.5, 0.9, 0.99 where enough were seen",
        ),
        ("tokmeter_inter_token_latency_seconds", "summary of ITL"),
        ("tokmeter_time_per_output_token_seconds", "summary of TPOT, a value per request"),
        ("tokmeter_request_duration_seconds", "summary of the end-to-end time"),
        ("tokmeter_step_seconds", "summary of the time of each forward pass"),
        ("tokmeter_power_watts", "energy over the metered time, all devices of the cell"),
        (
            "tokmeter_joules_per_token",
            "energy over the tokens between the same readings; label tokens: input or output",
        ),
        (
            "tokmeter_idle_power_watts",
            "meter.idle_no_context and meter.idle_context_resident, all metered devices; label state",
        ),
        ("tokmeter_memory_bandwidth_utilization_ratio", "MBU, of the bandwidth measured in the same run"),
        ("tokmeter_matmul_utilization_ratio", "MFU, of the matmul peak measured in the same run"),
        ("tokmeter_cell_flag", "1 for each remark on the cell; label flag, such as not_quiet or failed"),
    ],
};

type Labels<'a> = [(&'a str, &'a str)];

/// Families in the order of their first sample: a family's samples must stand together.
#[derive(Default)]
struct Page {
    families: Vec<Family>,
}

struct Family {
    name: &'static str,
    kind: &'static str,
    samples: String,
}

impl Page {
    fn gauge(&mut self, name: &'static str, labels: &Labels<'_>, value: f64) {
        self.family(name, "gauge").sample("", labels, value);
    }

    fn summary(&mut self, name: &'static str, labels: &Labels<'_>, quantiles: &Maybe<Quantiles>) {
        let Some(found) = quantiles.value() else { return };
        let family = self.family(name, "summary");
        for (quantile, value_ns) in [("0.5", &found.p50_ns), ("0.9", &found.p90_ns), ("0.99", &found.p99_ns)]
        {
            if let Some(value_ns) = value_ns.value() {
                family.sample("", &[labels, &[("quantile", quantile)]].concat(), value_ns / 1e9);
            }
        }
        family.sample("_sum", labels, found.mean_ns * found.count as f64 / 1e9);
        family.sample("_count", labels, found.count as f64);
    }

    fn family(&mut self, name: &'static str, kind: &'static str) -> &mut Family {
        let place = self.families.iter().position(|family| family.name == name).unwrap_or_else(|| {
            self.families.push(Family { name, kind, samples: String::new() });
            self.families.len() - 1
        });
        &mut self.families[place]
    }

    fn text(&self) -> String {
        let mut text = String::new();
        for Family { name, kind, samples } in &self.families {
            let help = ABOUT.fields.iter().find(|(field, _)| field == name).map_or("", |(_, help)| help);
            let _ = write!(text, "# HELP {name} {help}\n# TYPE {name} {kind}\n{samples}");
        }
        text
    }
}

impl Family {
    fn sample(&mut self, suffix: &str, labels: &Labels<'_>, value: f64) {
        let labels: Vec<String> =
            labels.iter().map(|(name, value)| format!("{name}=\"{}\"", escaped(value))).collect();
        let _ = writeln!(self.samples, "{}{suffix}{{{}}} {value}", self.name, labels.join(","));
    }
}

fn escaped(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

pub(super) fn export(sources: &[Source<'_>]) -> Result<Exported, Refusal> {
    let mut page = Page::default();
    for source in sources {
        add_record(&mut page, source);
        let mut visits: BTreeMap<&str, u32> = BTreeMap::new();
        let summary = summarize(source.record);
        for (cell, summary) in source.record.cells.iter().zip(&summary.cells) {
            let visit = visits.entry(&cell.key).or_default();
            *visit += 1;
            add_cell(&mut page, source, (cell, summary), *visit);
        }
    }
    Ok(Exported { text: page.text(), notes: Vec::new() })
}

fn add_record(page: &mut Page, source: &Source<'_>) {
    let (record, id) = (source.record, source.id());
    let driver = record.machine.gpu_driver.version.value().map_or("", String::as_str);
    let measurement = if record.not_a_measurement.is_some() { "no" } else { "yes" };
    let labels = [
        ("record", id),
        ("file", source.file),
        ("driver", driver),
        ("tool_version", &record.tool.version),
        ("weights", &record.model.weights.format),
        ("measurement", measurement),
    ];
    page.gauge("tokmeter_record_info", &labels, 1.0);
    if let Ok(started) = record.started_at.parse::<jiff::Timestamp>() {
        let seconds = started.as_millisecond() as f64 / 1e3;
        page.gauge("tokmeter_record_started_timestamp_seconds", &[("record", id)], seconds);
    }
    let meter = &record.meter;
    for (state, idle) in
        [("no_context", &meter.idle_no_context), ("context_resident", &meter.idle_context_resident)]
    {
        if let Some(idle) = idle.value() {
            page.gauge("tokmeter_idle_power_watts", &[("record", id), ("state", state)], idle.power_w);
        }
    }
}

/// A cell that was visited several times has series of its own for each visit.
fn add_cell(page: &mut Page, source: &Source<'_>, (cell, summary): (&Cell, &CellSummary), visit: u32) {
    let (record, visit) = (source.record, visit.to_string());
    let labels = [
        ("record", source.id()),
        ("model", record.model.name.as_str()),
        ("device", subject::device_name(record)),
        ("backend", &record.engine.backend),
        ("compute_dtype", &record.engine.compute_dtype),
        ("cell", &cell.key),
        ("visit", &visit),
    ];
    for flag in super::csv::flag_names(summary) {
        page.gauge("tokmeter_cell_flag", &[&labels[..], &[("flag", flag.as_str())]].concat(), 1.0);
    }
    let Some(sums) = Sums::of(&cell.runs).filter(|_| is_measured(cell)) else { return };
    page.gauge("tokmeter_measured_seconds", &labels, sums.seconds);
    if sums.tokens_in > 0.0 {
        page.gauge("tokmeter_input_tokens_per_second", &labels, sums.tokens_in / sums.seconds);
    }
    page.gauge("tokmeter_output_tokens_per_second", &labels, sums.tokens_out / sums.seconds);
    page.summary("tokmeter_time_to_first_token_seconds", &labels, &summary.ttft);
    page.summary("tokmeter_inter_token_latency_seconds", &labels, &summary.itl);
    page.summary("tokmeter_time_per_output_token_seconds", &labels, &summary.tpot);
    page.summary("tokmeter_request_duration_seconds", &labels, &summary.e2e);
    page.summary("tokmeter_step_seconds", &labels, &summary.step);
    if let Some(power_w) = summary.energy.power_w.value() {
        page.gauge("tokmeter_power_watts", &labels, *power_w);
    }
    if let (Some(joules), Some(rate)) = (summary.energy.joules_per_token.value(), summary.throughput.value())
    {
        let tokens = match rate.tokens {
            TokenKind::Input => "input",
            TokenKind::Output => "output",
        };
        page.gauge("tokmeter_joules_per_token", &[&labels[..], &[("tokens", tokens)]].concat(), *joules);
    }
    for (name, share) in [
        ("tokmeter_memory_bandwidth_utilization_ratio", &summary.mbu_share),
        ("tokmeter_matmul_utilization_ratio", &summary.mfu_share),
    ] {
        if let Some(share) = share.value() {
            page.gauge(name, &labels, *share);
        }
    }
}
