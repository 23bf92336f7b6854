//! Records of a machine whose laws are known: times and energies are computed from chosen coefficients, with noise from a
//! counter.

#![allow(dead_code, unreachable_pub)] // each test crate uses its own part

#[allow(clippy::duplicate_mod)] // a test crate may use made-up and planted records
mod ceiling;

use std::collections::BTreeMap;
use std::path::Path;

use ceiling::ceiling;
use tokmeter::analysis::calibrate::Given;
use tokmeter::record::machine::Gpu;
use tokmeter::record::{Ceilings, Energy, Maybe, Record, Workload, hold_out, read};

/// What the machine obeys: seconds and joules of decode steps and of batches of prompts.
#[derive(Clone, Copy)]
pub struct Truth {
    pub decode_s: fn(batch: f64, kv_tokens: f64) -> f64,
    pub prefill_s: fn(batch: f64, isl: f64) -> f64,
    pub decode_j: fn(batch: f64, kv_tokens: f64) -> f64,
    pub prefill_j: fn(batch: f64, isl: f64) -> f64,
    /// Standard deviation of a run, as a share.
    pub noise: f64,
    pub seed: u64,
}

/// SmolLM2-135M in f32 on a device of 20 GB/s and 100 Gflop/s: weights take 27 ms at least, a token's keys and values 2.3 µs,
/// its arithmetic 2.7 ms, a prompt token's 2.1 ms.
pub const LINEAR: Truth = Truth {
    decode_s: |batch, kv_tokens| 40e-3 + 5e-3 * batch + 4e-6 * kv_tokens,
    prefill_s: |batch, isl| 30e-3 + 4e-3 * batch * isl + 1e-6 * batch * isl * (isl + 1.0) / 2.0,
    decode_j: |batch, kv_tokens| 8.0 + 0.5 * batch + 2e-4 * kv_tokens,
    prefill_j: |batch, isl| 6.0 + 0.3 * batch * isl + 5e-5 * batch * isl * (isl + 1.0) / 2.0,
    noise: 0.0,
    seed: 1,
};

pub fn decode_grid() -> Vec<Workload> {
    let mut cells = Vec::new();
    for depth in [128, 256, 512, 1024, 2048] {
        for batch in [1, 2, 4, 8, 16, 32, 64] {
            cells.push(Workload::Decode { batch, depth, osl: 16 });
        }
    }
    cells
}

pub fn prefill_grid() -> Vec<Workload> {
    let mut cells = Vec::new();
    for batch in [1, 2, 4] {
        for isl in [16, 32, 64, 128, 256, 512, 1024] {
            cells.push(Workload::Prefill { batch, isl });
        }
    }
    cells
}

/// A record of these cells, three runs each, as the truth has it.
pub fn record(truth: &Truth, cells: &[Workload]) -> Given {
    let path =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("results/2026-11-23-cpu-2-cores/smollm2-135m-f32.json");
    let mut record = read(&path).unwrap();
    let template = record.cells[0].clone();
    let device = "cuda:0".to_owned();
    record.engine.device = device.clone();
    record.engine.chunk_tokens = 8192;
    record.engine.kv_pages = 1 << 20;
    record.machine.gpus = vec![Gpu {
        index: 0,
        name: Maybe::Value("NVIDIA B200".to_owned()),
        uuid: Maybe::missing("not_found"),
        memory_bytes: Maybe::missing("not_found"),
        compute_capability: Maybe::missing("not_found"),
        setup: Maybe::missing("not_found"),
    }];
    record.ceilings = Maybe::Value(vec![Ceilings {
        device: device.clone(),
        read_bandwidth_bytes_per_s: ceiling(20e9),
        copy_bandwidth_bytes_per_s: ceiling(19e9),
        matmul_flops_per_s: BTreeMap::from([("f32".to_owned(), ceiling(100e9))]),
        ..Ceilings::missing("not_a_gpu")
    }]);
    record.command.planned_cells = cells.iter().map(Workload::key).collect();
    record.command.hold_out = Maybe::Value(hold_out(cells));
    let mut noise = Noise(truth.seed);
    record.cells = cells
        .iter()
        .map(|workload| {
            let mut cell = template.clone();
            cell.key = workload.key();
            cell.workload = *workload;
            cell.devices = vec![device.clone()];
            let run = cell.runs[0].clone();
            cell.runs = vec![run; 3];
            for (index, run) in cell.runs.iter_mut().enumerate() {
                run.index = index as u32;
                run.windows.truncate(1);
                let window = &mut run.windows[0];
                let (seconds, joules, steps) = match *workload {
                    Workload::Decode { batch, depth, osl } => {
                        let kv_tokens = f64::from(batch) * (f64::from(depth) + (f64::from(osl) + 1.0) / 2.0);
                        let batch = f64::from(batch);
                        (
                            (truth.decode_s)(batch, kv_tokens),
                            (truth.decode_j)(batch, kv_tokens),
                            u64::from(osl),
                        )
                    }
                    Workload::Prefill { batch, isl } => {
                        let (batch, isl) = (f64::from(batch), f64::from(isl));
                        ((truth.prefill_s)(batch, isl), (truth.prefill_j)(batch, isl), 1)
                    }
                    _ => panic!("no truth for {workload:?}"),
                };
                window.passes = 10;
                window.steps = 10 * steps;
                let window_s = seconds * window.steps as f64 * (1.0 + truth.noise * noise.normal());
                window.t1_ns = window.t0_ns + (window_s * 1e9).round() as u64;
                let energy_j = joules * window.steps as f64 * (1.0 + truth.noise * noise.normal());
                window.energy = Maybe::Value(Energy {
                    t_a_ns: window.t0_ns,
                    t_b_ns: window.t1_ns,
                    energy_j,
                    uncertainty_j: 0.0,
                    tokens_in: window.tokens_in as f64,
                    tokens_out: window.tokens_out as f64,
                    doubts: Vec::new(),
                    devices: Vec::new(),
                    sampler_cpu_ns: Maybe::missing("not_measured"),
                });
            }
            cell
        })
        .collect();
    Given { file: "planted.json".to_owned(), record }
}

/// Changes the time of every window of the cells that `pick` names.
pub fn slow_down(record: &mut Record, factor: f64, pick: impl Fn(&str) -> bool) {
    for cell in record.cells.iter_mut().filter(|cell| pick(&cell.key)) {
        for window in cell.runs.iter_mut().flat_map(|run| &mut run.windows) {
            window.t1_ns = window.t0_ns + ((window.t1_ns - window.t0_ns) as f64 * factor) as u64;
        }
    }
}

/// Numbers of mean 0 and variance 1 from a counter.
struct Noise(u64);

impl Noise {
    fn uniform(&mut self) -> f64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let mixed = (self.0 ^ (self.0 >> 31)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        (mixed >> 11) as f64 / (1_u64 << 53) as f64
    }

    fn normal(&mut self) -> f64 {
        (0..12).map(|_| self.uniform()).sum::<f64>() - 6.0
    }
}
