//! Power meters against known curves: a stand-in for NVML that plays a power over time on a virtual clock, trees of
//! `/sys` files, and the program itself with a replayed trace. What is expected is integrated here, step by step.

#![allow(clippy::unwrap_used, unsafe_code)] // the stand-in is a C library

#[path = "common/fake_nvml.rs"]
mod fake_nvml;
#[path = "common/program.rs"]
mod program;

use std::ffi::{CString, c_char};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use fake_nvml::library;
use libloading::{Library as Loaded, Symbol};
use program::{BINARY, fake_record, tokmeter};
use tempfile::tempdir;
use tokmeter::analysis;
use tokmeter::clock::Clock;
use tokmeter::meter::nvml::{GpuId, Library, NvmlGauge};
use tokmeter::meter::{
    CounterReading, Gauge, Hwmon, Measured, Piece, PowerReading, PowerSensor, Quantity, Rapl, Sampled,
    Sampler, Samples, SensorInfo, Series, assess, conditions, duty, measure_period, probe,
};
use tokmeter::record::{Energy, IdlePower, Maybe, MeteredDevice, Outcome, Record, read, violations};

const S: u64 = 1_000_000_000;
const MS: u64 = 1_000_000;

/// One stand-in with a clock of its own.
struct Fake {
    loaded: Loaded,
    path: PathBuf,
    clock: Clock,
}

impl Fake {
    fn new(settings: &str) -> Self {
        Self::built(settings, false)
    }

    fn built(settings: &str, withdrawn: bool) -> Self {
        static COPIES: AtomicUsize = AtomicUsize::new(0);
        // A file of its own is loaded a second time, with its own state.
        let copy = COPIES.fetch_add(1, Ordering::Relaxed);
        let path = library(withdrawn).with_extension(format!("{}-{copy}.so", std::process::id()));
        std::fs::copy(library(withdrawn), &path).unwrap();
        // SAFETY: the stand-in's initialisers do nothing.
        let loaded = unsafe { Loaded::new(&path) }.unwrap();
        let now = Arc::new(AtomicU64::new(0));
        let fake = Fake { loaded, path, clock: Clock::Scripted(Arc::clone(&now)) };
        fake.configure(settings);
        // SAFETY: the function has this signature; the clock is given away and lives to the end of the program.
        unsafe {
            let clock: Symbol<'_, unsafe extern "C" fn(*const AtomicU64)> =
                fake.loaded.get(b"fake_clock").unwrap();
            clock(Arc::into_raw(now));
        }
        fake
    }

    fn configure(&self, settings: &str) {
        let text = CString::new(settings).unwrap();
        // SAFETY: the function has this signature and copies the text.
        unsafe {
            let configure: Symbol<'_, unsafe extern "C" fn(*const c_char)> =
                self.loaded.get(b"fake_configure").unwrap();
            configure(text.as_ptr());
        }
    }

    fn library(&self) -> Library {
        Library::open(self.path.as_os_str()).unwrap()
    }

    /// All its devices.
    fn gauge(&self) -> (NvmlGauge, SensorInfo) {
        let library = self.library();
        library.gauge(&library.all().unwrap(), &self.clock).unwrap()
    }

    /// Samples over a window of `seconds`, with a moment of load before and after.
    fn sample(&self, gauge: &mut dyn Gauge, info: &SensorInfo, seconds: f64) -> (Samples, u64, u64) {
        let mut sampler = Sampler::new(gauge, &self.clock, info);
        let t0_ns = self.clock.now_ns();
        let t1_ns = t0_ns + (seconds * 1e9) as u64;
        while self.clock.now_ns() < t1_ns && sampler.turn() {}
        self.clock.sleep_until_ns(t1_ns);
        let series = sampler.finish();
        (Samples { series, sampler_cpu_ns: Maybe::missing("no_thread"), clock_stepped: false }, t0_ns, t1_ns)
    }

    /// The energy of a window of `seconds` under a perfectly even load.
    fn energy(&self, seconds: f64) -> Result<Energy, String> {
        let (mut gauge, info) = self.gauge();
        let (samples, t0_ns, t1_ns) = self.sample(&mut gauge, &info, seconds);
        assess_even(&info, &samples, t0_ns, t1_ns)
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        std::fs::remove_file(&self.path).ok();
    }
}

/// A thousand tokens a second, without a pause.
fn assess_even(info: &SensorInfo, samples: &Samples, t0_ns: u64, t1_ns: u64) -> Result<Energy, String> {
    let tokens = |ns: u64| ns / MS;
    let pieces = [Piece { begin_ns: 0, end_ns: 1000 * S, tokens_in: 0, tokens_out: tokens(1000 * S) }];
    let window = Measured { t0_ns, t1_ns, tokens_out: tokens(t1_ns - t0_ns), pieces: &pieces };
    assess(info, samples, &window)
}

/// ∫ P dt in J, by the midpoints of 20 µs.
fn integral_of(power_w: &dyn Fn(f64) -> f64, from_ns: u64, to_ns: u64) -> f64 {
    let (from_s, to_s) = (from_ns as f64 / 1e9, to_ns as f64 / 1e9);
    let steps = ((to_s - from_s) / 20e-6).ceil();
    let step_s = (to_s - from_s) / steps;
    (0..steps as u64).map(|k| power_w(from_s + (k as f64 + 0.5) * step_s) * step_s).sum()
}

type Curve = (&'static str, Box<dyn Fn(f64) -> f64>);

/// Settings of the stand-in and the same power written down again.
fn curves() -> Vec<Curve> {
    let square = |low: f64, high: f64, period: f64, duty: f64| {
        move |t: f64| if t.rem_euclid(period) < duty * period { high } else { low }
    };
    vec![
        ("constant:431", Box::new(|_| 431.0)),
        ("ramp:250,550,15", Box::new(|t| 250.0 + 300.0 * t / 15.0)),
        ("sine:400,120,0.83", Box::new(|t: f64| 400.0 + 120.0 * (std::f64::consts::TAU * t / 0.83).sin())),
        ("square:300,500,1.73,0.5,0", Box::new(square(300.0, 500.0, 1.73, 0.5))),
        ("square:150,650,0.1,0.5,0", Box::new(square(150.0, 650.0, 0.1, 0.5))),
    ]
}

#[test]
fn energy_between_updates_is_that_of_the_curve_and_the_half_width_covers_the_error() {
    let mut cases = 0;
    let mut worst = [0.0f64; 2];
    for (trace, power_w) in curves() {
        for period_ms in [10, 20, 97, 100] {
            for jitter_ms in [0, 1, 5, 10] {
                let settings = format!("trace={trace};period_ms={period_ms};jitter_ms={jitter_ms}");
                let energy =
                    Fake::new(&settings).energy(10.0).unwrap_or_else(|why| panic!("{settings}: {why}"));
                let true_j = integral_of(&power_w, energy.t_a_ns, energy.t_b_ns);
                let error = (energy.energy_j / true_j - 1.0).abs();
                let allowed = if jitter_ms <= 5 { 1e-3 } else { 2e-3 };
                assert!(error <= allowed, "{settings}: off by {error}");
                // The counter itself is cut to whole millijoules at both ends.
                let covered_j = energy.uncertainty_j + 2e-3;
                assert!(
                    (energy.energy_j - true_j).abs() <= covered_j,
                    "{settings}: not within {covered_j} J"
                );
                assert!(
                    energy.uncertainty_j <= 0.004 * true_j,
                    "{settings}: ± {} J says little",
                    energy.uncertainty_j
                );
                assert!(energy.t_b_ns - energy.t_a_ns > 8 * S, "{settings}");
                worst[usize::from(jitter_ms > 5)] = worst[usize::from(jitter_ms > 5)].max(error);
                cases += 1;
            }
        }
    }
    assert_eq!(cases, 5 * 4 * 4);
    assert!(worst[0] < worst[1], "slower calls blur the updates more: {worst:?}");
}

#[test]
fn reading_the_counter_at_any_instant_is_worse() {
    let (mut naive, mut aligned) = (0.0f64, 0.0f64);
    for phase_ms in (0..100).step_by(7) {
        let fake = Fake::new(&format!("trace=constant:400;phase_ms={phase_ms}"));
        let (mut gauge, info) = fake.gauge();
        let before_uj = gauge.counter_uj(0).unwrap();
        let begin_ns = fake.clock.now_ns();
        let (samples, t0_ns, t1_ns) = fake.sample(&mut gauge, &info, 10.05);
        let after_uj = gauge.counter_uj(0).unwrap();
        let seconds = (fake.clock.now_ns() - begin_ns) as f64 / 1e9;
        let error = ((after_uj - before_uj) as f64 / 1e6 / (400.0 * seconds) - 1.0).abs();
        assert!(error <= 0.1 / seconds * 1.01, "beyond one period: {error}");
        let energy = assess_even(&info, &samples, t0_ns, t1_ns).unwrap();
        let span_s = (energy.t_b_ns - energy.t_a_ns) as f64 / 1e9;
        aligned = aligned.max((energy.energy_j / (400.0 * span_s) - 1.0).abs());
        naive = naive.max(error);
    }
    assert!(naive > 4e-3 && aligned < naive / 10.0, "naive {naive}, aligned {aligned}");
}

#[test]
fn power_readings_alone_give_the_energy_of_slow_curves() {
    for (trace, power_w) in curves().into_iter().take(4) {
        let energy = Fake::new(&format!("trace={trace};jitter_ms=2")).energy(10.0).unwrap();
        let device = &energy.devices[0];
        let true_j = integral_of(&power_w, device.t_a_ns, device.t_b_ns);
        let integral_j = *device.integral_j.value().unwrap();
        assert!((integral_j / true_j - 1.0).abs() < 0.01, "{trace}: {integral_j} J, expected {true_j} J");
        assert!(energy.doubts.is_empty(), "{trace}: {:?}", energy.doubts);
    }
}

#[test]
fn a_load_in_step_with_the_power_sensor_is_caught_by_the_counter() {
    // On for half of each 100 ms, and the sensor looks at 25 ms of each 100 ms: at the wrong half.
    let energy = Fake::new("trace=square:150,650,0.1,0.5,0").energy(10.0).unwrap();
    assert_eq!(energy.doubts, ["counter_and_power_disagree"]);
    assert!((energy.energy_j / ((energy.t_b_ns - energy.t_a_ns) as f64 / 1e9) / 400.0 - 1.0).abs() < 2e-3);
    assert!(*energy.devices[0].integral_j.value().unwrap() < 0.5 * energy.energy_j);
}

#[test]
fn energy_from_power_alone_never_claims_more_than_its_runs_agree_on() {
    // In step with the sensor, and in another phase in each run, as the runner sees to.
    let energies: Vec<Energy> = [0.0, 0.03, 0.06, 0.09]
        .iter()
        .map(|shift_s| {
            let fake = Fake::new(&format!("counter_code=3;trace=square:150,650,0.1,0.5,{shift_s}"));
            fake.energy(10.0).unwrap()
        })
        .collect();
    assert!(energies.iter().all(|energy| energy.doubts.contains(&"power_integrated_only".to_owned())));
    let power_w = |energy: &Energy| energy.energy_j / ((energy.t_b_ns - energy.t_a_ns) as f64 / 1e9);
    let powers: Vec<f64> = energies.iter().map(power_w).collect();
    let worst = powers.iter().map(|w| (w / 400.0 - 1.0).abs()).fold(0.0, f64::max);
    assert!(worst > 0.2, "the curve is not hard enough: {powers:?}");
    let claimed = claimed_uncertainty(&energies);
    let (low, high) = powers.iter().fold((f64::MAX, f64::MIN), |(low, high), w| (low.min(*w), high.max(*w)));
    assert!(
        claimed >= 0.99 * (high - low) / (high + low) && claimed > 0.2,
        "claimed {claimed} of {powers:?}"
    );
    // One run says nothing about its phase, so nothing is claimed.
    let mut record = fake_record(tempdir().unwrap().path());
    record.cells.truncate(1);
    record.cells[0].runs.truncate(1);
    record.cells[0].runs[0].windows[0].energy = Maybe::Value(energies[0].clone());
    let summary = analysis::summarize(&record);
    assert_eq!(summary.cells[0].energy.energy_uncertainty_ratio.reason(), Some("needs_2_runs"));
}

/// What a summary of runs with these energies says of its error.
fn claimed_uncertainty(energies: &[Energy]) -> f64 {
    let mut record = fake_record(tempdir().unwrap().path());
    let cell = &mut record.cells[2];
    cell.runs = energies.iter().map(|_| cell.runs[0].clone()).collect();
    for (run, energy) in cell.runs.iter_mut().zip(energies) {
        run.windows[0].energy = Maybe::Value(energy.clone());
    }
    *analysis::summarize(&record).cells[2].energy.energy_uncertainty_ratio.value().unwrap()
}

#[test]
fn every_driver_gives_the_right_time_held_down() {
    for driver in ["570.86.15", "580.65.06", "580.82.07", "590.44.01"] {
        let fake = Fake::new(&format!("driver={driver}"));
        let (mut gauge, info) = fake.gauge();
        let (samples, ..) = fake.sample(&mut gauge, &info, 10.0);
        let events = conditions(&samples.series[0].states).clock_events.into_value().unwrap();
        let seconds = 10.0;
        // The stand-in holds down by 1, 2, 3 and 4 ms a second, by cause.
        for (held_ns, rate) in [
            (&events.software_thermal_ns, 1e6),
            (&events.hardware_thermal_ns, 2e6),
            (&events.hardware_power_brake_ns, 3e6),
            (&events.software_power_cap_ns, 4e6),
        ] {
            let held_ns = *held_ns.value().unwrap() as f64;
            assert!((held_ns / (rate * seconds) - 1.0).abs() < 0.02, "{driver}: {events:?}");
        }
        assert_eq!(events.reasons_mask, Maybe::Value("0x10000000004".to_owned()), "unknown bits are kept");
    }
    let unknown = Fake::new("driver=next");
    let (mut gauge, info) = unknown.gauge();
    let events = conditions(&unknown.sample(&mut gauge, &info, 3.0).0.series[0].states).clock_events;
    let events = events.into_value().unwrap();
    assert_eq!(events.software_thermal_ns.reason(), Some("driver_version_unknown"));
    assert!(events.software_power_cap_ns.value().is_some(), "this field never moved");
}

#[test]
fn withdrawn_functions_are_not_needed_and_old_ones_still_serve() {
    for (fake, temperature_c, mask) in [
        (Fake::built("driver=590.44.01", true), 61.0, "0x10000000004"),
        (Fake::new("driver=590.44.01"), 61.0, "0x10000000004"),
        (Fake::new("driver=535.104.05;old_driver=1"), 59.0, "0x4"),
    ] {
        let (mut gauge, info) = fake.gauge();
        let (samples, t0_ns, t1_ns) = fake.sample(&mut gauge, &info, 10.0);
        let found = conditions(&samples.series[0].states);
        let temperature = found.temperature.into_value().unwrap();
        assert_eq!((temperature.start_c, temperature.end_c), (temperature_c, temperature_c));
        let clocks = found.clocks.into_value().unwrap();
        assert_eq!((clocks.sm_mean_mhz, clocks.memory_mhz), (1755.0, Maybe::Value(2619.0)));
        assert_eq!(found.clock_events.into_value().unwrap().reasons_mask, Maybe::Value(mask.to_owned()));
        assert!(assess_even(&info, &samples, t0_ns, t1_ns).is_ok());
    }
    let neither = Fake::built("old_driver=1", true);
    let (mut gauge, info) = neither.gauge();
    let found = conditions(&neither.sample(&mut gauge, &info, 3.0).0.series[0].states);
    assert_eq!(found.temperature.reason(), Some("function_not_found"));
    assert_eq!(found.clock_events.into_value().unwrap().reasons_mask.reason(), Some("not_supported"));
}

#[test]
fn a_fault_is_a_reason_and_never_a_number() {
    for (settings, expected) in [
        ("reset_s=7", "counter_reset"),
        ("stuck_s=7", "counter_stuck"),
        ("stuck_s=0", "counter_stuck"),
        ("lost_s=7", "gpu_is_lost"),
        ("trace=constant:900", "power_above_limit"),
        ("trace=constant:0.000001", "counter_stuck"),
    ] {
        assert_eq!(Fake::new(settings).energy(10.0), Err(expected.to_owned()), "{settings}");
    }
    // Without a sensor there is not even a window.
    for (settings, expected) in [
        ("counter_code=3;power_code=3", "not_supported"),
        ("counter_code=4;power_code=4", "no_permission"),
        ("counter_code=26;power_code=3", "deprecated"),
        ("lost_s=0", "gpu_is_lost"),
    ] {
        let fake = Fake::new(settings);
        let library = fake.library();
        let absent = library.gauge(&library.all().unwrap(), &fake.clock).err().unwrap();
        assert_eq!(absent.reason, expected, "{settings}");
    }
    for (code, expected) in [(9, "driver_not_loaded"), (4, "no_permission"), (18, "driver_library_mismatch")]
    {
        let fake = Fake::new(&format!("init_code={code}"));
        let absent = Library::open(fake.path.as_os_str()).err().unwrap();
        assert_eq!(absent.reason, expected);
        assert!(absent.remedy.is_some(), "{expected} has no remedy");
    }
    let absent = Library::open("/nonexistent/libnvidia-ml.so.1".as_ref()).err().unwrap();
    assert_eq!(absent.reason, "no_nvml");
}

#[test]
fn power_of_zero_or_of_another_shape_is_no_witness() {
    for (settings, expected) in [
        ("zero_power=1", "power_is_zero"),
        ("foreign_answer=1", "not_supported"),
        ("foreign_answer=2", "not_supported"),
        ("foreign_answer=3", "not_supported"),
    ] {
        let energy = Fake::new(settings).energy(10.0).unwrap();
        assert_eq!(energy.devices[0].integral_j.reason(), Some(expected), "{settings}");
        let alone = Fake::new(&format!("counter_code=3;{settings}"));
        let library = alone.library();
        let found = library.gauge(&library.all().unwrap(), &alone.clock);
        let reason = match found {
            Err(absent) => absent.reason,
            Ok((mut gauge, info)) => {
                let (samples, t0_ns, t1_ns) = alone.sample(&mut gauge, &info, 10.0);
                assess_even(&info, &samples, t0_ns, t1_ns).unwrap_err()
            }
        };
        assert_eq!(reason, expected, "{settings}");
    }
}

#[test]
fn a_superchip_that_gives_the_module_alone_says_so() {
    let fake = Fake::new("counter_code=3;power_code=3;module_code=0;trace=constant:400");
    let (_, info) = fake.gauge();
    assert_eq!((info.source, info.scope, info.quantity), ("nvml_module", "module", Quantity::Power));
    assert_eq!(info.devices[0].power_limit_w.reason(), Some("not_known"));
    let energy = fake.energy(10.0).unwrap();
    let power_w = energy.energy_j / 10.0;
    assert!((power_w - 520.0).abs() < 1.0, "GPU and 120 W beside it: {power_w} W");
    assert_eq!(energy.doubts, ["power_integrated_only"]);
    // Where both are there, the counter and the power of the GPU belong together.
    let both = Fake::new("module_code=0;trace=constant:400").energy(10.0).unwrap();
    assert!((both.devices[0].integral_j.value().unwrap() / both.energy_j - 1.0).abs() < 1e-3);
    // The module's power is no witness for the GPU's counter.
    let apart = Fake::new("power_code=3;module_code=0;trace=constant:400").energy(10.0).unwrap();
    assert_eq!(apart.devices[0].integral_j.reason(), Some("not_supported"));
}

#[test]
fn several_gpus_are_summed_over_the_same_interval() {
    let fake = Fake::new("gpus=3;trace=constant:100;jitter_ms=1;limit_w=400");
    let energy = fake.energy(10.0).unwrap();
    assert_eq!(energy.devices.len(), 3);
    let span_s = (energy.t_b_ns - energy.t_a_ns) as f64 / 1e9;
    // 100, 200 and 300 W, updated at different times.
    assert!((energy.energy_j / span_s / 600.0 - 1.0).abs() < 1e-3, "{energy:?}");
    for device in &energy.devices {
        assert!(device.t_a_ns <= energy.t_a_ns && energy.t_b_ns <= device.t_b_ns);
    }
    let begins: Vec<u64> = energy.devices.iter().map(|device| device.t_a_ns).collect();
    assert!(begins[0] != begins[1] && begins[1] != begins[2]);
}

#[test]
fn what_others_draw_too_is_in_doubt() {
    for settings in ["mig=1", "processes=2"] {
        let energy = Fake::new(settings).energy(10.0).unwrap();
        assert_eq!(energy.doubts, ["device_shared"], "{settings}");
    }
    assert_eq!(Fake::new("").energy(3.0).unwrap().doubts, ["short_window"]);
}

#[test]
fn a_counter_that_changes_its_period_is_not_trusted() {
    let fake = Fake::new("period_ms=100");
    let (mut gauge, info) = fake.gauge();
    fake.configure("period_ms=400");
    let (samples, t0_ns, t1_ns) = fake.sample(&mut gauge, &info, 10.0);
    assert_eq!(assess_even(&info, &samples, t0_ns, t1_ns), Err("update_period_changed".to_owned()));
}

#[test]
fn power_and_tokens_must_agree() {
    let fake = Fake::new("trace=constant:400");
    let (mut gauge, info) = fake.gauge();
    let (samples, t0_ns, t1_ns) = fake.sample(&mut gauge, &info, 10.0);
    // Stamps that say one percent more tokens in the window than the work that was done.
    let pieces = [Piece { begin_ns: 0, end_ns: 1000 * S, tokens_in: 0, tokens_out: 1_000_000 }];
    let window = Measured { t0_ns, t1_ns, tokens_out: 10_100, pieces: &pieces };
    let expected = Err("power_is_not_energy_per_token_times_rate".to_owned());
    assert_eq!(assess(&info, &samples, &window), expected);
    let idle = SensorInfo { idle_floor_w: Some(450.0), ..info };
    assert_eq!(assess_even(&idle, &samples, t0_ns, t1_ns), Err("power_below_idle".to_owned()));
}

/// A tree of `/sys` with these files.
fn tree(files: &[(&str, &str)]) -> tempfile::TempDir {
    let dir = tempdir().unwrap();
    for (path, text) in files {
        let path = dir.path().join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }
    dir
}

const PACKAGES: [(&str, &str); 9] = [
    ("intel-rapl:0/name", "package-0"),
    ("intel-rapl:0/energy_uj", "261900000000"),
    ("intel-rapl:0/max_energy_range_uj", "262143328850"),
    ("intel-rapl:1/name", "package-1"),
    ("intel-rapl:1/energy_uj", "5000000"),
    ("intel-rapl:1/max_energy_range_uj", "262143328850"),
    ("intel-rapl:0:0/name", "dram"),
    ("intel-rapl:0:0/energy_uj", "7"),
    ("intel-rapl:0:0/max_energy_range_uj", "9"),
];

#[test]
fn two_packages_are_summed_and_a_counter_that_wraps_around_goes_on() {
    let dir = tree(&PACKAGES);
    let mut rapl = Rapl::open(dir.path()).unwrap();
    let info = Rapl::open(dir.path()).unwrap().sensor().info();
    assert_eq!(
        info.devices.iter().map(|device| device.device.as_str()).collect::<Vec<_>>(),
        ["package-0", "package-1"]
    );
    let clock = Clock::scripted();
    let write = |zone: &str, energy_uj: u64| {
        std::fs::write(dir.path().join(zone).join("energy_uj"), energy_uj.to_string()).unwrap();
    };
    let mut sampler = Sampler::new(&mut rapl, &clock, &info);
    // 100 W and 60 W for five seconds: package 0 wraps around after 2.43 s.
    while clock.now_ns() < 5 * S {
        let us = clock.now_ns() / 1000;
        write("intel-rapl:0", (261_900_000_000 + 100 * us) % 262_143_328_850);
        write("intel-rapl:1", 5_000_000 + 60 * us);
        sampler.turn();
    }
    let samples = Samples {
        series: sampler.finish(),
        sampler_cpu_ns: Maybe::missing("no_thread"),
        clock_stepped: false,
    };
    let energy = assess_even(&info, &samples, 0, 5 * S).unwrap();
    let power_w = energy.energy_j / ((energy.t_b_ns - energy.t_a_ns) as f64 / 1e9);
    // A reading here is as old as the turn before it: 50 ms of 5 s at either end.
    assert!((power_w / 160.0 - 1.0).abs() < 0.02, "{power_w} W");
    assert_eq!(energy.devices.len(), 2);
}

#[test]
fn a_package_counter_that_was_set_back_is_no_energy() {
    let dir = tree(&PACKAGES);
    let mut rapl = Rapl::open(dir.path()).unwrap();
    rapl.begin();
    assert_eq!(rapl.counter_uj(1), Ok(5_000_000));
    std::fs::write(dir.path().join("intel-rapl:1/energy_uj"), "4000000").unwrap();
    assert_eq!(rapl.counter_uj(1), Err("counter_reset".to_owned()));
    rapl.begin();
    assert_eq!(rapl.counter_uj(1), Ok(4_000_000), "what was before the window is not held against it");
}

#[test]
fn a_package_counter_without_permission_comes_with_the_exact_command() {
    let dir = tree(&[PACKAGES[0], PACKAGES[2]]);
    let counter = dir.path().join("intel-rapl:0/energy_uj");
    // A file that nobody may read, not even root.
    std::os::unix::fs::symlink("/proc/sys/vm/compact_memory", &counter).unwrap();
    let absent = Rapl::open(dir.path()).unwrap_err();
    assert_eq!(absent.reason, "rapl_permission", "{absent:?}");
    assert!(absent.remedy.unwrap().starts_with(&format!("sudo chmod a+r {} ", counter.display())));
    assert_eq!(Rapl::open(&dir.path().join("none")).unwrap_err().reason, "no_powercap");
}

#[test]
fn a_grace_socket_is_read_at_its_widest_scope() {
    let dir = tree(&[
        ("hwmon0/device/power1_oem_info", "CPU Power Socket 0"),
        ("hwmon0/device/power1_average", "90000000"),
        ("hwmon1/device/power1_oem_info", "Module Power Socket 0"),
        ("hwmon1/device/power1_average", "510000000"),
        ("hwmon1/device/power1_cap", "700000000"),
        ("hwmon2/name", "nvme"),
    ]);
    let mut hwmon = Hwmon::open(dir.path()).unwrap();
    assert_eq!(hwmon.power_w(0), Ok(510.0));
    let info = hwmon.sensor().info();
    assert_eq!((info.scope, info.devices.len()), ("module", 1));
    assert_eq!(info.devices[0].power_limit_w, Maybe::Value(700.0));
    assert_eq!(Hwmon::open(&dir.path().join("none")).unwrap_err().reason, "no_hwmon_power");
}

/// 300 W at any time, without a library.
struct Steady(Clock);

impl Gauge for Steady {
    fn counter_uj(&mut self, _device: usize) -> Result<u64, String> {
        Ok(self.0.now_ns() / (100 * MS) * 30_000_000)
    }

    fn power_w(&mut self, _device: usize) -> Result<f64, String> {
        Ok(300.0)
    }
}

/// Without optimisation it may take somewhat more.
const SAMPLER_SHARE: f64 = if cfg!(debug_assertions) { 0.005 } else { 0.003 };

#[test]
fn the_sampling_thread_takes_less_than_three_thousandths_of_the_window() {
    let fake = Fake::new("");
    let (_, info) = fake.gauge();
    let clock = Clock::monotonic();
    let mut sensor = Sampled::new(Box::new(Steady(clock.clone())), info.clone());
    sensor.begin(&clock);
    let t0_ns = clock.now_ns();
    clock.sleep_until_ns(t0_ns + 4 * S);
    sensor.end();
    let t1_ns = clock.now_ns();
    let samples = sensor.collect(&clock, (t0_ns, t1_ns));
    let energy = assess_even(&info, &samples, t0_ns, t1_ns).unwrap();
    assert!((energy.energy_j / ((energy.t_b_ns - energy.t_a_ns) as f64 / 1e9) / 300.0 - 1.0).abs() < 0.01);
    let share = *energy.sampler_cpu_ns.value().unwrap() as f64 / (t1_ns - t0_ns) as f64;
    assert!(share < SAMPLER_SHARE, "{share} of the window");
    let readings = samples.series[0].counter.as_ref().unwrap().len();
    assert!((20..800).contains(&readings), "{readings} reads in 4 s");
}

#[test]
fn a_probe_finds_period_unit_calls_and_additivity() {
    let fake = Fake::new("trace=sine:300,3,0.7;period_ms=20;unit_mj=5;jitter_ms=1");
    let (mut gauge, info) = fake.gauge();
    let found = probe::probe(&mut gauge, &fake.clock, &info, 0);
    let period_ns = found.update_period_ns.unwrap();
    assert!(period_ns.abs_diff(20 * MS) <= 2 * MS, "{period_ns}");
    assert_eq!(found.resolution_uj.unwrap() % 5000, 0, "a multiple of the unit");
    let (median_ns, late_ns) = found.call_ns.unwrap();
    assert!(median_ns > 200_000 && median_ns < 900_000 && late_ns <= 1_100_000, "{median_ns}, {late_ns}");
    assert!((found.counter_over_power.unwrap() - 1.0).abs() < 0.01);
    assert!(found.additivity_error.unwrap().abs() <= 1e-3);
    assert!(measure_period(&mut gauge, &fake.clock, 0).unwrap().abs_diff(20 * MS) <= 2 * MS);
    let silent = Fake::new("counter_code=3");
    let (mut gauge, info) = silent.gauge();
    assert_eq!(
        probe::probe(&mut gauge, &silent.clock, &info, 0).update_period_ns,
        Err("no_counter".to_owned())
    );
}

#[test]
fn the_width_of_the_average_shows_under_a_load_that_drifts_through_it() {
    for width_ms in [10, 25] {
        // Readings every 100 ms of a load with a period of 93 ms: the phase moves on by 7 ms each time.
        let fake = Fake::new(&format!("trace=square:150,650,0.093,0.5,0;width_ms={width_ms}"));
        let (mut gauge, info) = fake.gauge();
        let (samples, ..) = fake.sample(&mut gauge, &info, 60.0);
        let readings = samples.series[0].power.clone().unwrap();
        let width_ns = probe::average_width_ns(&readings, 93 * MS).unwrap();
        assert!(width_ns.abs_diff(width_ms * MS) <= 3 * MS, "{width_ns} ns, expected {width_ms} ms");
    }
    let even = Fake::new("");
    let (mut gauge, info) = even.gauge();
    let readings = even.sample(&mut gauge, &info, 20.0).0.series[0].power.clone().unwrap();
    assert_eq!(probe::average_width_ns(&readings, 93 * MS), Err("no_contrast".to_owned()));
}

#[test]
fn energy_grows_in_proportion_to_the_work() {
    let fake = Fake::new("trace=constant:300;jitter_ms=2");
    let (mut gauge, info) = fake.gauge();
    let points: Vec<(f64, f64)> = (1..=8)
        .map(|k| {
            let (samples, t0_ns, t1_ns) = fake.sample(&mut gauge, &info, f64::from(k));
            let energy = assess_even(&info, &samples, t0_ns, t1_ns).unwrap();
            let whole_s = (t1_ns - t0_ns) as f64 / 1e9;
            (f64::from(k), energy.energy_j / ((energy.t_b_ns - energy.t_a_ns) as f64 / 1e9) * whole_s)
        })
        .collect();
    assert!(probe::linearity(&points).unwrap() > 0.999, "{points:?}");
}

/// A device that draws 600 W while a load works and 150 W otherwise, on a scripted clock, and its sensor.
struct Switched {
    clock: Clock,
    /// Beginnings and ends of unbroken work.
    worked_ns: Arc<Mutex<Vec<(u64, u64)>>>,
    /// Of the average behind power, which is updated every 100 ms.
    width_ns: u64,
    /// The counter's power is the device's to this power.
    bend: f64,
    counter: Result<(), String>,
    begin_ns: u64,
}

impl Switched {
    fn new(width_ms: u64) -> Self {
        Switched {
            clock: Clock::scripted(),
            worked_ns: Arc::default(),
            width_ns: width_ms * MS,
            bend: 1.0,
            counter: Ok(()),
            begin_ns: 0,
        }
    }

    fn energy_j(&self, t_ns: u64) -> f64 {
        let until = |(begin, end): &(u64, u64)| (*end).min(t_ns).saturating_sub(*begin);
        let busy_ns: u64 = self.worked_ns.lock().unwrap().iter().map(until).sum();
        150.0 * t_ns as f64 / 1e9 + 450.0 * busy_ns as f64 / 1e9
    }

    fn power_w(&self, from_ns: u64, to_ns: u64) -> f64 {
        (self.energy_j(to_ns) - self.energy_j(from_ns)) / ((to_ns - from_ns) as f64 / 1e9)
    }

    /// Half a millisecond before and after each update.
    fn counter_readings(&self, t1_ns: u64) -> Vec<CounterReading> {
        let first = self.begin_ns / (100 * MS) + 1;
        let (mut energy_uj, mut readings) = (1_000_000u64, Vec::new());
        for tick_ns in (first..).map(|tick| tick * 100 * MS).take_while(|tick_ns| *tick_ns + MS < t1_ns) {
            let at =
                |at_ns, energy_uj| CounterReading { before_ns: at_ns, after_ns: at_ns + 1000, energy_uj };
            readings.push(at(tick_ns - MS / 2, energy_uj));
            energy_uj += (self.power_w(tick_ns - 100 * MS, tick_ns).powf(self.bend) * 1e5) as u64;
            readings.push(at(tick_ns + MS / 2, energy_uj));
        }
        readings
    }

    fn under_load(&mut self) -> duty::UnderLoad {
        let (clock, worked_ns) = (self.clock.clone(), Arc::clone(&self.worked_ns));
        clock.advance_ns(10 * S);
        let mut load = || {
            let begin_ns = clock.now_ns();
            clock.advance_ns(MS);
            let mut worked_ns = worked_ns.lock().unwrap();
            match worked_ns.last_mut() {
                Some((_, end_ns)) if *end_ns == begin_ns => *end_ns += MS,
                _ => worked_ns.push((begin_ns, begin_ns + MS)),
            }
            Ok(())
        };
        let clock = self.clock.clone();
        duty::under_load(self, &clock, &mut load, 4 * S).unwrap()
    }
}

impl PowerSensor for Switched {
    fn info(&self) -> SensorInfo {
        let known = |ns| Maybe::Value(ns);
        SensorInfo {
            source: "nvml_total_energy",
            scope: "gpu",
            quantity: Quantity::TickingCounter,
            devices: vec![MeteredDevice {
                device: "cuda:0".to_owned(),
                update_period_ns: known(100 * MS),
                power_limit_w: Maybe::missing("not_known"),
                shared: Maybe::Value(false),
            }],
            systematic_share: Maybe::missing("not_known"),
            shortest_window_ns: 0,
            idle_floor_w: None,
            trace: Maybe::missing("no_trace"),
        }
    }

    fn begin(&mut self, clock: &Clock) {
        self.begin_ns = clock.now_ns();
    }

    fn end(&mut self) {}

    fn collect(&mut self, _: &Clock, (_, t1_ns): (u64, u64)) -> Samples {
        let shown = |at_ns: u64| {
            let updated_ns = at_ns / (100 * MS) * (100 * MS);
            PowerReading { at_ns, power_w: self.power_w(updated_ns - self.width_ns, updated_ns) }
        };
        let times = (0..).map(|k| self.begin_ns + k * 73 * MS).take_while(|at_ns| *at_ns < t1_ns);
        let series = Series {
            counter: self.counter.clone().map(|()| self.counter_readings(t1_ns)),
            power: Ok(times.map(shown).collect()),
            states: Vec::new(),
        };
        Samples { series: vec![series], sampler_cpu_ns: Maybe::missing("no_thread"), clock_stepped: false }
    }
}

#[test]
fn a_load_in_shares_shows_a_straight_sensor_and_a_bent_one() {
    let found = Switched::new(25).under_load();
    let steps = found.steps.unwrap();
    assert_eq!(steps.len(), 9);
    for (step, eighths) in steps.iter().zip(0..) {
        // Work comes in whole milliseconds of a period of 93.
        assert!((step.busy_share - f64::from(eighths) / 8.0).abs() < 0.02, "{step:?}");
        let expected_w = 150.0 + 450.0 * step.busy_share;
        assert!((step.power_w / expected_w - 1.0).abs() < 1e-3, "{step:?}, expected {expected_w} W");
    }
    assert!(found.linearity_r2.clone().unwrap() > 0.99999, "{:?}", found.linearity_r2);
    let bent = Switched { bend: 1.5, ..Switched::new(25) }.under_load();
    assert!(bent.linearity_r2.clone().unwrap() < 0.999, "{:?}", bent.linearity_r2);
    let silent = Switched { counter: Err("not_supported".to_owned()), ..Switched::new(25) }.under_load();
    assert_eq!(silent.steps, Err("not_supported".to_owned()));
    assert_eq!(silent.linearity_r2, Err("not_supported".to_owned()));
    assert_eq!(silent.average_width, Err("no_reference_power".to_owned()));
}

#[test]
fn the_width_of_the_average_is_found_with_a_load_slow_enough_for_it() {
    for (width_ms, load_period_ms) in [(10, 93), (25, 93), (200, 930), (1000, 4092)] {
        let found = Switched::new(width_ms).under_load().average_width.unwrap();
        assert_eq!(found.load_period_ns, load_period_ms * MS, "{width_ms} ms");
        let allowed_ns = (2 * MS).max(width_ms * MS / 12);
        assert!(found.width_ns.abs_diff(width_ms * MS) <= allowed_ns, "{found:?}, expected {width_ms} ms");
    }
    let wider = Switched::new(5000).under_load().average_width;
    assert_eq!(wider, Err("average_too_wide".to_owned()));
}

/// 10 ms a step, 2 ms for each sequence that decodes: 83.3 tokens a second.
const SCRIPT: &str = r#"{"base_ns":10000000,"per_prefill_token_ns":1000000,"per_decode_token_ns":2000000,"per_context_token_ps":0}"#;

fn replayed(folder: &Path, trace: &str, more: &[&str]) -> program::Finished {
    std::fs::write(folder.join("power.csv"), trace).unwrap();
    let args = ["run", "--device", "cpu", "--engine", "fake", "--fake-script", SCRIPT, "-o", "r.json"];
    let load = ["--batch", "1", "--depth", "40", "--osl", "6", "--power", "replay:power.csv"];
    let runs: &[&str] = if more.contains(&"-r") { &[] } else { &["-r", "2"] };
    tokmeter(folder, &[&args[..], &load, runs, more].concat())
}

#[test]
fn a_replayed_trace_gives_the_tokens_per_joule_of_the_arithmetic() {
    let folder = tempdir().unwrap();
    let lines: String = (0..4000).map(|k| format!("{}.{:02},250\n", k / 100, k % 100)).collect();
    let trace = format!("t_s,watts\n{lines}");
    let done =
        replayed(folder.path(), &trace, &["--min-seconds", "0.5", "--format", "json", "--require-energy"]);
    assert_eq!(done.code, Some(0), "{done:?}");
    let summary: serde_json::Value = serde_json::from_str(&done.stdout).unwrap();
    let cell = &summary["cells"][0];
    // By hand: a token every 12 ms at 250 W is 3 J.
    for (field, expected) in [("joules_per_token", 3.0), ("tokens_per_joule", 1.0 / 3.0), ("power_w", 250.0)]
    {
        let found = cell[field].as_f64().unwrap();
        assert!((found / expected - 1.0).abs() < 0.005, "{field}: {found}");
    }
    let rate = cell["throughput"]["tokens_per_s"].as_f64().unwrap();
    let power_w = rate * cell["joules_per_token"].as_f64().unwrap();
    assert!((power_w / 250.0 - 1.0).abs() < 0.005);
    assert_eq!(summary["energy_from"], "replay, node");
    let record = read(&folder.path().join("r.json")).unwrap();
    assert_eq!(violations(&record), []);
    assert_eq!(record.meter.trace.value().unwrap().name, "power.csv");
    assert!(record.not_a_measurement.is_some());
}

#[test]
fn tokens_of_the_cpu_over_a_replayed_trace_are_tokens_per_second_over_watts() {
    let folder = tempdir().unwrap();
    // 40 W, from the beginning of the program to longer than it runs.
    let lines: String = (0..6000).map(|k| format!("{}.{:02},40\n", k / 100, k % 100)).collect();
    std::fs::write(folder.path().join("power.csv"), format!("t_s,watts\n{lines}")).unwrap();
    let model = program::tiny_model();
    let args = ["run", "--device", "cpu", "-m", model.to_str().unwrap(), "--power", "replay:power.csv"];
    let load =
        ["--batch", "2", "--depth", "8", "--osl", "8", "--min-seconds", "1", "-r", "2", "-o", "r.json"];
    let done = tokmeter(folder.path(), &[&args[..], &load, &["--format", "json"]].concat());
    assert_eq!(done.code, Some(0), "{done:?}");
    let record = read(&folder.path().join("r.json")).unwrap();
    let windows = || record.cells[0].runs.iter().flat_map(|run| &run.windows);
    let tokens: u64 = windows().map(|window| window.tokens_out).sum();
    let seconds: f64 = windows().map(|window| (window.t1_ns - window.t0_ns) as f64 / 1e9).sum();
    let by_hand = tokens as f64 / seconds / 40.0;
    let summary: serde_json::Value = serde_json::from_str(&done.stdout).unwrap();
    let found = summary["cells"][0]["tokens_per_joule"].as_f64().unwrap();
    assert!((found / by_hand - 1.0).abs() < 0.005, "{found} tokens per joule, {by_hand} by hand");
}

/// What is planted in an energy, and what is said of it.
type Contradiction = (&'static str, fn(&mut Record));

fn energy_of(record: &mut Record) -> &mut Energy {
    match &mut record.cells[0].runs[0].windows[0].energy {
        Maybe::Value(energy) => energy,
        Maybe::Missing(missing) => panic!("{}", missing.missing),
    }
}

const CONTRADICTIONS: [Contradiction; 8] = [
    ("is not inside its window", |record| {
        energy_of(record).t_b_ns += 1_000_000;
        energy_of(record).devices[0].t_b_ns += 1_000_000;
    }),
    ("expected its devices' 247.500 W", |record| energy_of(record).devices[0].energy_j *= 0.99),
    ("times tokens per second is", |record| energy_of(record).tokens_out *= 1.006),
    ("times tokens per second is", |record| energy_of(record).tokens_out = 0.0),
    ("expected the doubt counter_and_power_disagree", |record| {
        let device = &mut energy_of(record).devices[0];
        device.integral_j = Maybe::Value(device.energy_j / 1.06);
    }),
    ("energy without a meter", |record| record.meter.source = Maybe::missing("no_sensor")),
    ("expected at most 1.05 of the limit of 230.0 W", |record| {
        if let Maybe::Value(devices) = &mut record.meter.devices {
            devices[0].power_limit_w = Maybe::Value(230.0);
        }
    }),
    ("expected at least the idle power of 299.0 W", |record| {
        let idle = IdlePower {
            power_w: 300.0,
            uncertainty_w: 1.0,
            duration_ns: S,
            parts_w: Maybe::missing("not_seen"),
        };
        record.meter.idle_no_context = Maybe::Value(idle);
    }),
];

#[test]
fn each_contradiction_planted_in_an_energy_is_found() {
    let folder = tempdir().unwrap();
    let lines: String = (0..400).map(|k| format!("{}.{},250\n", k / 10, k % 10)).collect();
    let done = replayed(folder.path(), &format!("t_s,watts\n{lines}"), &["--min-seconds", "2", "-r", "1"]);
    assert_eq!(done.code, Some(0), "{done:?}");
    let sound = read(&folder.path().join("r.json")).unwrap();
    assert_eq!(violations(&sound), []);
    for (what, plant) in CONTRADICTIONS {
        let mut record = sound.clone();
        plant(&mut record);
        let found = violations(&record);
        assert!(found.len() == 1 && found[0].what.contains(what), "{what}: {found:?}");
    }
}

#[test]
fn the_table_shows_joules_where_there_are_any() {
    let folder = tempdir().unwrap();
    let lines: String = (0..400).map(|k| format!("{}.{},250\n", k / 10, k % 10)).collect();
    let done = replayed(folder.path(), &format!("t_s,watts\n{lines}"), &["--min-seconds", "2"]);
    assert_eq!(done.code, Some(0), "{done:?}");
    assert!(done.stdout.contains("tok/J  J/tok    W"), "{}", done.stdout);
    assert!(done.stdout.contains("0.333   3.00  250"), "{}", done.stdout);
    assert!(done.stdout.contains("tok/J, J/tok, W: from replay, node; gross, idle power included"));
}

#[test]
fn required_energy_that_is_not_there_fails_the_cell() {
    let folder = tempdir().unwrap();
    let short: String = (0..10).map(|k| format!("{k},250\n")).collect();
    let done = replayed(folder.path(), &format!("t_s,watts\n{short}"), &["--require-energy"]);
    assert_eq!(done.code, Some(1), "{done:?}");
    let record = read(&folder.path().join("r.json")).unwrap();
    let expected = "--require-energy: a window has no energy (trace_ends_early)";
    assert_eq!(record.cells[0].outcome, Outcome::Failed { error: expected.to_owned() });
    // Windows of 10 s, so that the trace of 10 s is too short for two of them.
    assert_eq!(record.command.min_seconds, 10.0);
    let none = tokmeter(
        folder.path(),
        &["run", "--engine", "fake", "--batch", "1", "--isl", "8", "--require-energy"],
    );
    assert_eq!(none.code, Some(1), "{none:?}");
    assert!(
        none.stderr.contains("--require-energy: a scripted engine draws no power\nhint: --power replay:FILE")
    );
    let lost = tokmeter(
        folder.path(),
        &["run", "--engine", "fake", "--batch", "1", "--isl", "8", "--power", "replay:none.csv"],
    );
    assert_eq!(lost.code, Some(3), "{lost:?}");
    assert!(lost.stderr.contains("none.csv"), "{lost:?}");
    let word = tokmeter(folder.path(), &["run", "--power", "guess"]);
    assert_eq!(word.code, Some(2), "{word:?}");
}

#[test]
fn idle_power_is_stored_and_subtracted_where_it_was_watched_long_enough() {
    let folder = tempdir().unwrap();
    // 100 W while nothing runs, until 90 s, then 250 W.
    let lines: String =
        (0..1000).map(|k| format!("{},{}\n", f64::from(k) / 5.0, if k < 451 { 100 } else { 250 })).collect();
    let args = ["--min-seconds", "5", "--format", "json", "--idle-seconds", "60"];
    let done = replayed(folder.path(), &format!("t_s,watts\n{lines}"), &args);
    assert_eq!(done.code, Some(0), "{done:?}");
    let record = read(&folder.path().join("r.json")).unwrap();
    for idle in [&record.meter.idle_no_context, &record.meter.idle_context_resident] {
        let idle = idle.value().unwrap();
        assert!((idle.power_w - 100.0).abs() < 1e-6 && idle.duration_ns == 60 * S, "{idle:?}");
    }
    let summary: serde_json::Value = serde_json::from_str(&done.stdout).unwrap();
    let net = summary["cells"][0]["net_tokens_per_joule"].as_f64().unwrap();
    // 150 W over idle and 12 ms a token: 1.8 J.
    assert!((net * 1.8 - 1.0).abs() < 0.005, "{net}");
}

#[test]
fn power_after_the_load_is_watched_from_its_end_and_its_parts_show_how_it_falls() {
    let folder = tempdir().unwrap();
    let args = ["--min-seconds", "5", "--idle-seconds", "60"];
    let trace = |watts: &dyn Fn(f64) -> f64| -> String {
        let lines = (0..1500).map(|k| f64::from(k) / 5.0).map(|t_s| format!("{t_s},{}\n", watts(t_s)));
        format!("t_s,watts\n{}", lines.collect::<String>())
    };
    let run = |watts: &dyn Fn(f64) -> f64| {
        std::fs::remove_file(folder.path().join("r.json")).ok();
        let done = replayed(folder.path(), &trace(watts), &args);
        assert_eq!(done.code, Some(0), "{done:?}");
        read(&folder.path().join("r.json")).unwrap()
    };
    // The clock is scripted, so the load ends at the same time in both runs.
    let first = run(&|t_s| if t_s < 90.2 { 100.0 } else { 250.0 });
    let end_s = first.cells[0].runs[1].windows[0].t1_ns as f64 / 1e9;
    let second = run(&|t_s| match t_s - end_s {
        _ if t_s < 90.2 => 100.0,
        after if after < 0.0 => 250.0,
        after if after < 20.0 => 160.0,
        after if after < 40.0 => 130.0,
        _ => 110.0,
    });
    let after = second.meter.idle_after_load.value().unwrap();
    assert_eq!(after.duration_ns, 60 * S);
    // By hand: 160, 130 and 110 W for 20 s each.
    assert!((after.power_w - 400.0 / 3.0).abs() < 1.0, "{after:?}");
    let parts = after.parts_w.value().unwrap();
    assert_eq!(parts.len(), 3);
    for (found, expected) in parts.iter().zip([160.0, 130.0, 110.0]) {
        assert!((found - expected).abs() < 1.0, "{parts:?}");
    }
    let ready = second.meter.idle_context_resident.value().unwrap();
    assert!(ready.parts_w.value().unwrap().iter().all(|watts| (watts - 100.0).abs() < 1e-6), "{ready:?}");
    assert_eq!(violations(&second), []);
}

#[test]
fn a_machine_without_a_meter_has_no_rung_and_says_why() {
    let folder = tempdir().unwrap();
    let args =
        ["run", "--device", "cpu", "--engine", "fake", "--batch", "1", "--isl", "8", "--idle-seconds", "60"];
    let done = tokmeter(folder.path(), &[&args[..], &["-o", "r.json"]].concat());
    assert_eq!(done.code, Some(0), "{done:?}");
    let meter = read(&folder.path().join("r.json")).unwrap().meter;
    for rung in [&meter.idle_no_context, &meter.idle_context_resident, &meter.idle_after_load] {
        assert_eq!(rung.reason(), Some("no_sensor"));
    }
}

#[test]
fn doctor_probes_the_sensors_of_a_gpu() {
    let folder = tempdir().unwrap();
    let run = |library: &Path, settings: &str| {
        let output = assert_cmd::Command::new(BINARY)
            .args(["doctor", "--sensors", "--format", "json"])
            .current_dir(folder.path())
            .env("TOKMETER_NVML", library)
            .env("FAKE_NVML", settings)
            .output()
            .unwrap();
        let found: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        (found["findings"].as_array().unwrap().clone(), found["sensor_probes"].clone())
    };
    let value = |findings: &[serde_json::Value], what: &str| {
        let finding = findings.iter().find(|finding| finding["what"] == what);
        let finding = finding.unwrap_or_else(|| panic!("{what} is not in {findings:#?}"));
        (finding["status"].as_str().unwrap().to_owned(), finding["value"].as_str().unwrap().to_owned())
    };
    let (findings, probes) = run(library(false), "period_ms=50;trace=sine:300,7,0.37");
    let (status, text) = value(&findings, "gpu:0 counter period");
    assert!(
        status == "ok" && (["48", "49", "50", "51"].iter().any(|start| text.starts_with(start))),
        "{text}"
    );
    assert_eq!(value(&findings, "gpu:0 energy adds up").0, "ok");
    assert_eq!(value(&findings, "gpu:0 counter against power").0, "ok");
    assert_eq!(value(&findings, "gpu:0 width of the power average").0, "missing");
    let found = &probes[0];
    assert!((48e6..52e6).contains(&found["update_period_ns"].as_f64().unwrap()), "{found}");
    assert!(found["additivity_error_ratio"].as_f64().unwrap().abs() <= 1e-3, "{found}");
    assert!(found["call_p99_ns"].as_u64() >= found["call_median_ns"].as_u64(), "{found}");
    for field in ["average_width_ns", "width_load_period_ns", "linearity_r2", "steps"] {
        assert_eq!(found[field]["missing"], "needs_a_load", "{found}");
    }
    let (findings, probes) = run(Path::new("/nonexistent/libnvidia-ml.so"), "");
    assert_eq!(value(&findings, "NVML probe").0, "missing");
    assert!(probes.is_null());
}

fn doctor(folder: &Path, args: &[&str]) -> serde_json::Value {
    let done = tokmeter(folder, &[&["doctor", "--device", "cpu", "--format", "json"], args].concat());
    assert_eq!(done.code, Some(0), "{done:?}");
    serde_json::from_str(&done.stdout).unwrap()
}

#[test]
fn what_reading_a_sensor_takes_is_measured_in_pairs_of_windows() {
    let folder = tempdir().unwrap();
    let lines: String = (0..3000).map(|k| format!("{}.{:02},40\n", k / 50, k % 50 * 2)).collect();
    std::fs::write(folder.path().join("power.csv"), format!("t_s,watts\n{lines}")).unwrap();
    let model = program::tiny_model();
    let tiny = ["--sampler-effect", "-m", model.to_str().unwrap(), "--seconds", "0.1", "--pairs", "20"];
    let found = doctor(folder.path(), &[&tiny[..], &["--power", "replay:power.csv", "--seed", "3"]].concat());
    let effect = &found["sampler_effect"];
    let pairs = effect["pairs"].as_array().unwrap();
    assert_eq!(pairs.len(), 20);
    let first = pairs.iter().filter(|pair| pair["reading_first"] == true).count();
    assert!((4..=16).contains(&first), "{first} of 20 began with reading");
    // The mean of the logarithms and its interval, by hand; t(0.975, 19) = 2.093024.
    let rate = |pair: &serde_json::Value, field: &str| pair[field].as_f64().unwrap();
    let logs: Vec<f64> = pairs
        .iter()
        .map(|pair| (rate(pair, "reading_tokens_per_s") / rate(pair, "not_reading_tokens_per_s")).ln())
        .collect();
    let mean = logs.iter().sum::<f64>() / 20.0;
    let variance = logs.iter().map(|log| (log - mean).powi(2)).sum::<f64>() / 19.0;
    let half = 2.093_024 * (variance / 20.0).sqrt();
    let change = &effect["tokens_per_s_change"];
    for (field, expected) in [("ratio", mean), ("low", mean - half), ("high", mean + half)] {
        let found = change[field].as_f64().unwrap();
        assert!(
            (found - expected.exp_m1()).abs() < 1e-6,
            "{field} is {found}, by hand {}",
            expected.exp_m1()
        );
    }
    // A file is read after the window: nothing can be slower for it.
    assert!(effect["not_a_measurement"].as_str().unwrap().contains("trace"), "{effect}");
    assert_eq!(effect["sampler_cpu_share"]["missing"], "no_sampler");
    assert_eq!((&effect["model"], &effect["weights"]), (&"llama".into(), &"synthetic".into()));
    let none = doctor(folder.path(), &[&tiny[..], &["--power", "nvml"]].concat());
    assert!(none.get("sampler_effect").is_none());
    let finding = none["findings"].as_array().unwrap().iter().find(|finding| finding["what"] == "cpu power");
    assert_eq!(finding.unwrap()["status"], "missing");
    let few = tokmeter(folder.path(), &["doctor", "--sampler-effect", "--pairs", "1"]);
    assert_eq!(few.code, Some(2), "{few:?}");
}

#[test]
fn a_named_gpu_is_found_by_its_identity() {
    let fake = Fake::new("gpus=2;trace=constant:100");
    let library = fake.library();
    let second = GpuId { name: "cuda:0".to_owned(), uuid: "GPU-fake-1".to_owned() };
    let (mut gauge, info) = library.gauge(std::slice::from_ref(&second), &fake.clock).unwrap();
    assert_eq!(info.devices[0].device, "cuda:0");
    fake.clock.advance_ns(S);
    assert_eq!(gauge.power_w(0), Ok(200.0), "the second one draws twice as much");
    let unknown = GpuId { name: "cuda:1".to_owned(), uuid: "GPU-other".to_owned() };
    assert_eq!(library.gauge(&[unknown], &fake.clock).err().unwrap().reason, "not_found");
    assert_eq!(library.gauge(&[], &fake.clock).err().unwrap().reason, "no_gpu");
}
