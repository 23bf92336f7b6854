//! Records of machines that do not exist: the scripted engine's, with the fields of a GPU filled in.

#![allow(dead_code, unreachable_pub)] // each test crate uses its own part

#[allow(clippy::duplicate_mod)] // a test crate may use made-up and planted records
mod ceiling;

use std::collections::BTreeMap;

use ceiling::ceiling;
use tokmeter::record::machine::Gpu;
use tokmeter::record::{Ceilings, Clocks, Energy, Maybe, Record, Temperature, Window};

/// Energy of a whole window at even power.
pub fn energy(window: &Window, watts: f64) -> Energy {
    Energy {
        t_a_ns: window.t0_ns,
        t_b_ns: window.t1_ns,
        energy_j: watts * (window.t1_ns - window.t0_ns) as f64 / 1e9,
        uncertainty_j: 0.0,
        tokens_in: window.tokens_in as f64,
        tokens_out: window.tokens_out as f64,
        doubts: Vec::new(),
        devices: Vec::new(),
        sampler_cpu_ns: Maybe::missing("not_measured"),
    }
}

pub fn clocks(sm_mean_mhz: f64) -> Clocks {
    Clocks { sm_mean_mhz, sm_min_mhz: sm_mean_mhz, memory_mhz: Maybe::Value(2619.0) }
}

pub fn temperature(start_c: f64, end_c: f64) -> Temperature {
    Temperature { start_c, end_c, max_c: end_c }
}

/// The same cells, as if one GPU named `gpu` had computed Llama 3.1 8B in bf16.
pub fn on_gpu(scripted: &Record, gpu: &str) -> Record {
    let mut record = scripted.clone();
    record.not_a_measurement = None;
    record.model.name = "llama-3.1-8b".to_owned();
    record.engine.device = "cuda:0".to_owned();
    record.engine.backend = "cuda".to_owned();
    record.engine.compute_dtype = "bf16".to_owned();
    record.engine.kv_dtype = "bf16".to_owned();
    record.engine.weights_bytes = 16_060_522_496;
    record.meter.source = Maybe::Value("nvml_total_energy".to_owned());
    record.meter.scope = Maybe::Value("gpu".to_owned());
    record.machine.gpu_driver.version = Maybe::Value("580.95.05".to_owned());
    record.machine.gpus = vec![Gpu {
        index: 0,
        name: Maybe::Value(gpu.to_owned()),
        uuid: Maybe::missing("redacted"),
        memory_bytes: Maybe::Value(80 << 30),
        compute_capability: Maybe::Value("9.0".to_owned()),
        setup: Maybe::missing("made_up"),
    }];
    record.cells.iter_mut().for_each(|cell| cell.devices = vec!["cuda:0".to_owned()]);
    record
}

/// Gives every window energy at `watts`, clocks and temperatures.
pub fn set_power(record: &mut Record, watts: f64) {
    for window in record.cells.iter_mut().flat_map(|cell| &mut cell.runs).flat_map(|run| &mut run.windows) {
        window.energy = Maybe::Value(energy(window, watts));
        window.clocks = Maybe::Value(clocks(1755.0));
        window.temperature = Maybe::Value(temperature(51.0, 54.0));
    }
}

/// Ceilings of the record's device: bytes and bf16 flops a second.
pub fn set_ceilings(record: &mut Record, bytes_per_s: f64, flops_per_s: f64) {
    record.ceilings = Maybe::Value(vec![Ceilings {
        device: record.engine.device.clone(),
        last_level_cache_bytes: Maybe::Value(50 << 20),
        read_bandwidth_bytes_per_s: ceiling(bytes_per_s),
        copy_bandwidth_bytes_per_s: ceiling(bytes_per_s * 0.9),
        matmul_flops_per_s: BTreeMap::from([(record.engine.compute_dtype.clone(), ceiling(flops_per_s))]),
        ..Ceilings::missing("not_measured")
    }]);
}
