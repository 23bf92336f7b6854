//! Ceilings and operations as a person reads them, and what each number was measured with.

use serde::Serialize;

use super::{Ops, Peaks};
use crate::cmd::table;
use crate::model::op_times::OpTime;
use crate::record::{BoundBy, Ceiling, Ceilings, Maybe};
use crate::units::{format_bytes, format_ns, format_significant};

/// How one ceiling was measured.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct Method {
    ceiling: String,
    method: &'static str,
}

/// How a ceiling's number reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Unit {
    BytesPerS,
    FlopsPerS,
    Ns,
}

impl Unit {
    fn text(self, value: f64) -> String {
        match self {
            Unit::BytesPerS => format!("{} GB/s", format_significant(value / 1e9)),
            Unit::FlopsPerS if value >= 1e13 => format!("{} TFLOP/s", format_significant(value / 1e12)),
            Unit::FlopsPerS => format!("{} GFLOP/s", format_significant(value / 1e9)),
            Unit::Ns => format_ns(value),
        }
    }

    fn work(self, work: u64) -> String {
        match self {
            Unit::BytesPerS => format_bytes(work),
            Unit::FlopsPerS => format!("{} GFLOP", format_significant(work as f64 / 1e9)),
            Unit::Ns => format!("{work} launches"),
        }
    }
}

/// A ceiling under its name.
struct Row<'a> {
    name: String,
    unit: Unit,
    method: &'static str,
    ceiling: &'a Maybe<Ceiling>,
}

fn rows(ceilings: &Ceilings) -> Vec<Row<'_>> {
    let row = |name: &str, unit, method, ceiling| Row { name: name.to_owned(), unit, method, ceiling };
    let is_cpu = ceilings.launch_ns.reason() == Some("not_a_gpu");
    let (read, copy) = if is_cpu {
        (
            "every thread compares the halves of its part, which are equal; bytes read",
            "every thread copies the first half of its part over the second; bytes read and written",
        )
    } else {
        (
            "a kernel reads the buffer in 128-bit loads, eight in flight a thread; bytes read",
            "a kernel copies the first half of the buffer over the second; bytes read and written",
        )
    };
    let matmul = if is_cpu {
        "a square product of random f32 matrices, doubled in size while there is time"
    } else {
        "a square product of random matrices eight times the L2 cache, sums in f32"
    };
    let mut rows = vec![
        row("read bandwidth", Unit::BytesPerS, read, &ceilings.read_bandwidth_bytes_per_s),
        row("copy bandwidth", Unit::BytesPerS, copy, &ceilings.copy_bandwidth_bytes_per_s),
    ];
    for (dtype, ceiling) in &ceilings.matmul_flops_per_s {
        rows.push(row(&format!("matmul {dtype}"), Unit::FlopsPerS, matmul, ceiling));
    }
    for (dtype, ceiling) in &ceilings.mma_flops_per_s {
        let method = "mma.sync m16n8k16 on registers, 8 independent chains a warp: issue rate, no memory";
        rows.push(row(&format!("mma {dtype}"), Unit::FlopsPerS, method, ceiling));
    }
    let launch = "empty kernels of one block a multiprocessor, launched one after another";
    let node = "the same captured, 256 in a graph";
    let up = "cuMemcpyHtoDAsync from pinned memory";
    let down = "cuMemcpyDtoHAsync to pinned memory";
    rows.push(row("launch", Unit::Ns, launch, &ceilings.launch_ns));
    rows.push(row("graph node", Unit::Ns, node, &ceilings.graph_node_ns));
    rows.push(row("host to device", Unit::BytesPerS, up, &ceilings.host_to_device_bytes_per_s));
    rows.push(row("device to host", Unit::BytesPerS, down, &ceilings.device_to_host_bytes_per_s));
    rows
}

pub(super) fn methods(ceilings: &Ceilings) -> Vec<Method> {
    rows(ceilings).into_iter().map(|row| Method { ceiling: row.name, method: row.method }).collect()
}

pub(super) fn text(peaks: &Peaks) -> String {
    let ceilings = &peaks.ceilings;
    let cache = match &ceilings.last_level_cache_bytes {
        Maybe::Value(bytes) => format_bytes(*bytes),
        Maybe::Missing(missing) => format!("unknown ({})", missing.missing),
    };
    let mut text = format!("{} · {} · last-level cache {cache}\n", ceilings.device, peaks.device_name);
    if let Some(reason) = &peaks.not_a_measurement {
        text.push_str(&format!("NOT A MEASUREMENT: {reason}\n"));
    }
    let mut table = table::plain(
        &["CEILING", "SUSTAINED", "±", "BEST", "MEDIAN", "REPETITIONS", "EACH", "OVER", "BY"],
        1..8,
    );
    let mut missing = Vec::new();
    for row in rows(ceilings) {
        match row.ceiling {
            Maybe::Missing(reason) => missing.push(format!("– {}: {}\n", row.name, reason.missing)),
            Maybe::Value(ceiling) => drop(table.add_row(fields(&row, ceiling))),
        }
    }
    text.push_str(&format!("\n{}\n\n", table::text(&table)));
    text.extend(missing);
    for row in rows(ceilings).into_iter().filter(|row| row.ceiling.value().is_some()) {
        text.push_str(&format!("{}: {}\n", row.name, row.method));
    }
    if let Some(ops) = &peaks.ops {
        text.push_str(&ops_text(ops));
    }
    text
}

fn fields(row: &Row<'_>, ceiling: &Ceiling) -> Vec<String> {
    let over = match ceiling.working_set_bytes {
        0 => "–".to_owned(),
        bytes => format_bytes(bytes),
    };
    vec![
        row.name.clone(),
        row.unit.text(ceiling.value),
        format!("{:.1} %", ceiling.spread_ratio * 100.0),
        row.unit.text(ceiling.best),
        row.unit.text(ceiling.median),
        ceiling.repetitions.to_string(),
        row.unit.work(ceiling.work_per_repetition),
        over,
        ceiling.by.clone(),
    ]
}

fn ops_text(ops: &Ops) -> String {
    let mut text = format!("\n{} · {} · {} weights, one layer\n", ops.model, ops.compute_dtype, ops.weights);
    let mut table = table::plain(
        &["STEP", "OPERATION", "TIME", "REPLAYED", "MB", "GFLOP", "BOUND", "OF BOUND", "BY", "COPIES"],
        [2, 3, 4, 5, 6, 7, 9],
    );
    for time in &ops.times {
        table.add_row(op_fields(time));
    }
    text.push_str(&format!("\n{}\n", table::text(&table)));
    if ops.times.iter().any(|time| time.in_cache) {
        text.push_str(
            "\n* all copies together are below 8 × the last-level cache, which may hold them: more than 100 % of the \
             bound is possible\n",
        );
    }
    text
}

fn op_fields(time: &OpTime) -> Vec<String> {
    let dash = || "–".to_owned();
    let micros = |ns: f64| format!("{} µs", format_significant(ns / 1e3));
    let ceiling = |time: &Maybe<Ceiling>| time.value().map_or_else(dash, |time| micros(time.value));
    let bound = time.bound.value();
    vec![
        time.step.clone(),
        time.op.to_owned(),
        ceiling(&time.time_ns),
        ceiling(&time.replayed_ns),
        format_significant(time.bytes as f64 / 1e6),
        format_significant(time.flops / 1e9),
        bound.map_or_else(dash, |bound| micros(bound.bound_ns)),
        time.bound_share.value().map_or_else(dash, |share| format!("{:.1} %", share * 100.0)),
        bound.map_or_else(dash, |bound| match bound.by {
            BoundBy::Memory => "memory".to_owned(),
            BoundBy::Matmul => "matmul".to_owned(),
        }),
        format!("{}{}", time.copies, if time.in_cache { " *" } else { "" }),
    ]
}
