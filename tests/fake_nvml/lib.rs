//! A stand-in for `libnvidia-ml.so.1`, built by the tests with `rustc --crate-type cdylib`. It plays a known power over
//! time, on a clock that it is given or on the machine's own, with the habits and the faults of real drivers: a counter
//! that is updated from time to time, power averaged over a part of that time, slow calls, renumbered fields, withdrawn
//! functions. The power may also be that of the emulated GPU's own load. `fake_configure` takes `key=value` pairs separated by `;`, and so does the variable `FAKE_NVML`.
//!
//! With `--cfg withdrawn` the functions that NVIDIA has withdrawn, and those of `environment`, are not there at all.

#![allow(non_snake_case)]

#[cfg(not(withdrawn))]
pub mod environment;

use std::collections::HashMap;
use std::ffi::{CStr, c_char, c_int, c_uint, c_ulonglong, c_void};
use std::sync::atomic::{AtomicPtr, AtomicU64, Ordering};
use std::sync::{LazyLock, Mutex};
use std::time::Instant;

const SUCCESS: c_int = 0;
const NOT_SUPPORTED: c_int = 3;
const GPU_IS_LOST: c_int = 15;
const DEPRECATED: c_int = 26;

/// Poison for a field that the driver of this number does not mean.
const POISON: u64 = 666_000_000_000;

static STATE: LazyLock<Mutex<State>> = LazyLock::new(|| {
    let text = std::env::var("FAKE_NVML").unwrap_or_default();
    Mutex::new(State { settings: parse(&text), random: 1 })
});
static CLOCK: AtomicPtr<AtomicU64> = AtomicPtr::new(std::ptr::null_mut());
static START: LazyLock<Instant> = LazyLock::new(Instant::now);

struct State {
    settings: HashMap<String, String>,
    random: u64,
}

fn parse(text: &str) -> HashMap<String, String> {
    let pairs = text.split(';').filter_map(|pair| pair.split_once('='));
    pairs.map(|(key, value)| (key.trim().to_owned(), value.trim().to_owned())).collect()
}

/// # Safety
/// `text` ends with a NUL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fake_configure(text: *const c_char) {
    let text = unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned();
    *STATE.lock().unwrap() = State { settings: parse(&text), random: 1 };
}

/// # Safety
/// `clock` outlives all later calls.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fake_clock(clock: *mut AtomicU64) {
    CLOCK.store(clock, Ordering::SeqCst);
}

impl State {
    fn number(&self, key: &str, default: f64) -> f64 {
        self.settings.get(key).map_or(default, |value| value.parse().expect(key))
    }

    /// Uniform in [0, 1).
    fn random(&mut self) -> f64 {
        self.random = self.random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.random >> 11) as f64 / (1u64 << 53) as f64
    }
}

fn now_s() -> f64 {
    let clock = CLOCK.load(Ordering::SeqCst);
    if clock.is_null() { START.elapsed().as_secs_f64() } else { unsafe { &*clock }.load(Ordering::SeqCst) as f64 / 1e9 }
}

/// Lets a part of the call's time pass; a real clock passes by itself.
fn pass(seconds: f64) {
    let clock = CLOCK.load(Ordering::SeqCst);
    if !clock.is_null() {
        unsafe { &*clock }.fetch_add((seconds * 1e9) as u64, Ordering::SeqCst);
    }
}

/// A call: its answer belongs to some moment between its beginning and its end.
fn call<T>(answer: impl FnOnce(&State, f64) -> T) -> T {
    let mut state = STATE.lock().unwrap();
    let jitter_s = state.number("jitter_ms", 0.0) / 1e3;
    let (whole, split) = (20e-6 + jitter_s * state.random(), state.random());
    pass(whole * split);
    let result = answer(&state, now_s());
    pass(whole * (1.0 - split));
    result
}

/// Energy since time 0, J: the closed integral of the power that is played.
fn energy_j(state: &State, t: f64) -> f64 {
    let text = state.settings.get("trace").map_or("constant:300", String::as_str);
    let (kind, numbers) = text.split_once(':').expect("a trace");
    let n: Vec<f64> = numbers.split(',').map(|number| number.parse().expect("a number")).collect();
    match kind {
        "constant" => n[0] * t,
        // From n0 to n1 over n2 seconds, and on.
        "ramp" => n[0] * t + (n[1] - n[0]) * t * t / (2.0 * n[2]),
        // Around n0, amplitude n1, period n2.
        "sine" => {
            let w = std::f64::consts::TAU / n[2];
            n[0] * t + n[1] / w * (1.0 - (w * t).cos())
        }
        // n0 and n1 by turns, period n2, a share n3 of it at n1, beginning at n4.
        "square" => {
            let at = t - n[4] + 1000.0 * n[2];
            let whole = (at / n[2]).floor();
            n[0] * t + (n[1] - n[0]) * (whole * n[2] * n[3] + (at - whole * n[2]).min(n[2] * n[3]))
        }
        // n0, and n1 more while the emulated GPU runs kernels.
        "load" => n[0] * t + n[1] * busy_s(t),
        other => panic!("no trace {other}"),
    }
}

/// Time, and how long the emulated GPU had run kernels by then, seconds; written down every millisecond.
static HISTORY: Mutex<Vec<(f64, f64)>> = Mutex::new(Vec::new());

unsafe extern "C" {
    fn dlopen(file: *const c_char, flags: c_int) -> *mut c_void;
    fn dlsym(library: *mut c_void, name: *const c_char) -> *mut c_void;
}

/// Busy time at `t`, straight between what was written down. The first caller starts the writer.
fn busy_s(t: f64) -> f64 {
    static WRITER: std::sync::Once = std::sync::Once::new();
    WRITER.call_once(|| {
        HISTORY.lock().unwrap().push((now_s(), 0.0));
        std::thread::spawn(|| {
            let mut busy_ns: Option<extern "C" fn() -> u64> = None;
            loop {
                busy_ns = busy_ns.or_else(emulated_busy_ns);
                let point = (now_s(), busy_ns.map_or(0.0, |busy_ns| busy_ns() as f64 / 1e9));
                HISTORY.lock().unwrap().push(point);
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
        });
    });
    let history = HISTORY.lock().unwrap();
    let after = history.partition_point(|(at_s, _)| *at_s <= t);
    match (history.get(after.wrapping_sub(1)), history.get(after)) {
        (Some((t0, b0)), Some((t1, b1))) => b0 + (b1 - b0) * (t - t0) / (t1 - t0),
        (Some((_, b0)), None) => *b0,
        (None, _) => 0.0,
    }
}

/// The function of the stand-in driver, once the program has loaded it.
fn emulated_busy_ns() -> Option<extern "C" fn() -> u64> {
    const LAZY_AND_NOT_ANEW: c_int = 1 | 4;
    let found = unsafe {
        let driver = dlopen(c"libcuda.so.1".as_ptr(), LAZY_AND_NOT_ANEW);
        if driver.is_null() { std::ptr::null_mut() } else { dlsym(driver, c"emu_busy_ns".as_ptr()) }
    };
    (!found.is_null()).then(|| unsafe { std::mem::transmute::<*mut c_void, extern "C" fn() -> u64>(found) })
}

fn index(device: *mut c_void) -> usize {
    device as usize - 1
}

/// Devices after the first draw twice, three times, … as much.
fn device_energy_j(state: &State, device: *mut c_void, t: f64) -> f64 {
    energy_j(state, t) * (index(device) + 1) as f64
}

fn lost(state: &State, t: f64) -> bool {
    t >= state.number("lost_s", f64::MAX)
}

fn counter_mj(state: &State, device: *mut c_void, t: f64) -> u64 {
    let period_s = state.number("period_ms", 100.0) / 1e3;
    let phase_s = state.number("phase_ms", 31.0) / 1e3 * (index(device) + 1) as f64 % period_s;
    let t = t.min(state.number("stuck_s", f64::MAX));
    let updated_s = ((t - phase_s) / period_s).floor() * period_s + phase_s;
    let reset_s = state.number("reset_s", f64::MAX);
    let mut energy_j = device_energy_j(state, device, updated_s) + 5e6;
    if updated_s >= reset_s {
        energy_j -= device_energy_j(state, device, reset_s) + 5e6;
    }
    let unit_mj = state.number("unit_mj", 1.0);
    ((energy_j * 1e3 / unit_mj).floor() * unit_mj).max(0.0) as u64
}

fn power_mw(state: &State, device: *mut c_void, t: f64) -> u64 {
    let (period_s, width_s) = (state.number("power_period_ms", 100.0) / 1e3, state.number("width_ms", 25.0) / 1e3);
    let updated_s = (t / period_s).floor() * period_s;
    let energy = |t| device_energy_j(state, device, t);
    ((energy(updated_s) - energy(updated_s - width_s)) / width_s * 1e3) as u64
}

unsafe fn put<T>(place: *mut T, value: T) -> c_int {
    unsafe { place.write(value) };
    SUCCESS
}

unsafe fn put_text(place: *mut c_char, length: c_uint, text: &str) -> c_int {
    for (index, byte) in text.bytes().chain([0]).take(length as usize).enumerate() {
        unsafe { place.add(index).write(byte as c_char) };
    }
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn nvmlInit_v2() -> c_int {
    LazyLock::force(&START);
    STATE.lock().unwrap().number("init_code", 0.0) as c_int
}

#[unsafe(no_mangle)]
pub extern "C" fn nvmlShutdown() -> c_int {
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlSystemGetDriverVersion(text: *mut c_char, length: c_uint) -> c_int {
    let version = STATE.lock().unwrap().settings.get("driver").cloned();
    unsafe { put_text(text, length, version.as_deref().unwrap_or("580.95.05")) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetCount_v2(count: *mut c_uint) -> c_int {
    let gpus = STATE.lock().unwrap().number("gpus", 1.0);
    unsafe { put(count, gpus as c_uint) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetHandleByIndex_v2(index: c_uint, device: *mut *mut c_void) -> c_int {
    unsafe { put(device, (index as usize + 1) as *mut c_void) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetHandleByUUID(uuid: *const c_char, device: *mut *mut c_void) -> c_int {
    let uuid = unsafe { CStr::from_ptr(uuid) }.to_string_lossy();
    // The emulated GPU has an identity of its own.
    if STATE.lock().unwrap().number("any_uuid", 0.0) > 0.0 {
        return unsafe { put(device, 1 as *mut c_void) };
    }
    match uuid.strip_prefix("GPU-fake-").and_then(|index| index.parse::<usize>().ok()) {
        Some(index) => unsafe { put(device, (index + 1) as *mut c_void) },
        None => 6,
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetUUID(device: *mut c_void, text: *mut c_char, length: c_uint) -> c_int {
    unsafe { put_text(text, length, &format!("GPU-fake-{}", index(device))) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetTotalEnergyConsumption(device: *mut c_void, energy: *mut c_ulonglong) -> c_int {
    call(|state, t| {
        let code = state.number("counter_code", 0.0) as c_int;
        match (lost(state, t), code) {
            (true, _) => GPU_IS_LOST,
            (false, SUCCESS) => unsafe { put(energy, counter_mj(state, device, t)) },
            (false, code) => code,
        }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetEnforcedPowerLimit(_device: *mut c_void, limit: *mut c_uint) -> c_int {
    let limit_w = STATE.lock().unwrap().number("limit_w", 700.0);
    unsafe { put(limit, (limit_w * 1e3) as c_uint) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetMigMode(_device: *mut c_void, now: *mut c_uint, next: *mut c_uint) -> c_int {
    let mode = STATE.lock().unwrap().number("mig", 0.0) as c_uint;
    unsafe { put(next, mode) };
    unsafe { put(now, mode) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetComputeRunningProcesses_v3(
    _device: *mut c_void,
    count: *mut c_uint,
    list: *mut Process,
) -> c_int {
    let processes = STATE.lock().unwrap().number("processes", 0.0) as c_uint;
    let room = unsafe { count.read() };
    unsafe { put(count, processes) };
    if room < processes {
        return 7;
    }
    for index in 0..processes {
        let process = Process { pid: 4002 - index, memory_bytes: 1 << 30, instances: [u32::MAX; 2] };
        unsafe { list.add(index as usize).write(process) };
    }
    SUCCESS
}

#[repr(C)]
pub struct Process {
    pid: c_uint,
    memory_bytes: u64,
    instances: [c_uint; 2],
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetClockInfo(_device: *mut c_void, kind: c_uint, clock: *mut c_uint) -> c_int {
    unsafe { put(clock, if kind == 2 { 2619 } else { 1755 }) }
}

#[repr(C)]
pub struct FieldValue {
    id: c_uint,
    scope: c_uint,
    timestamp: i64,
    latency_us: i64,
    kind: c_uint,
    code: c_int,
    value: u64,
}

/// Nanoseconds that clocks were held down up to time `t`: three distinguishable rates for the causes.
fn held_ns(cause: u64, t: f64) -> u64 {
    1_000_000_000 * cause + (t * 1e6 * cause as f64) as u64
}

fn field(state: &State, device: *mut c_void, id: c_uint, scope: c_uint, t: f64) -> Result<(c_uint, u64), c_int> {
    let version = state.settings.get("driver").map_or("580.95.05", String::as_str);
    let mut parts = version.split('.').map(|part| part.parse::<u32>().unwrap_or(0));
    let is_new = (parts.next().unwrap_or(0), parts.next().unwrap_or(0)) >= (580, 82);
    let first = if is_new { 269 } else { 251 };
    if lost(state, t) {
        return Err(GPU_IS_LOST);
    }
    match id {
        186 => {
            let key = if scope == 1 { "module_code" } else { "power_code" };
            let default = if scope == 1 { f64::from(NOT_SUPPORTED) } else { 0.0 };
            let zero = state.number("zero_power", 0.0) > 0.0;
            let extra_mw = if scope == 1 { 120_000 } else { 0 };
            match state.number(key, default) as c_int {
                SUCCESS if zero => Ok((1, 0)),
                SUCCESS => Ok((1, power_mw(state, device, t) + extra_mw)),
                code => Err(code),
            }
        }
        74 => Ok((3, held_ns(4, t))),
        76 => Ok((3, held_ns(5, t))),
        _ if (first..first + 3).contains(&id) => Ok((3, held_ns(u64::from(id - first) + 1, t))),
        251..=273 => Ok((3, POISON + u64::from(id))),
        _ => Err(NOT_SUPPORTED),
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetFieldValues(device: *mut c_void, count: c_int, values: *mut FieldValue) -> c_int {
    call(|state, t| {
        // 1: another field's answer, 2: another type, 3: nothing is filled in.
        let foreign = state.number("foreign_answer", 0.0) as u32;
        for index in 0..count as usize {
            let value = unsafe { &mut *values.add(index) };
            match field(state, device, value.id, value.scope, t) {
                _ if foreign == 3 => {}
                Ok((kind, number)) => {
                    (value.kind, value.code, value.value) = (kind, SUCCESS, number);
                    value.timestamp = (t * 1e6) as i64;
                    value.id += u32::from(foreign == 1);
                    value.kind = if foreign == 2 { 0 } else { value.kind };
                }
                Err(code) => value.code = code,
            }
        }
        SUCCESS
    })
}

#[repr(C)]
pub struct Temperature {
    version: c_uint,
    sensor: c_uint,
    temperature: c_int,
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetTemperatureV(_device: *mut c_void, temperature: *mut Temperature) -> c_int {
    let temperature = unsafe { &mut *temperature };
    if STATE.lock().unwrap().number("old_driver", 0.0) > 0.0 {
        return NOT_SUPPORTED;
    }
    if temperature.version != (1 << 24 | 12) {
        return 25;
    }
    temperature.temperature = 61;
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetCurrentClocksEventReasons(_device: *mut c_void, mask: *mut c_ulonglong) -> c_int {
    if STATE.lock().unwrap().number("old_driver", 0.0) > 0.0 {
        return NOT_SUPPORTED;
    }
    unsafe { put(mask, 1 << 40 | 4) }
}

/// What a withdrawn function answers: its value where the driver is old, an error where it is new.
#[cfg(not(withdrawn))]
unsafe fn withdrawn<T>(place: *mut T, value: T) -> c_int {
    if STATE.lock().unwrap().number("old_driver", 0.0) > 0.0 { unsafe { put(place, value) } } else { DEPRECATED }
}

#[cfg(not(withdrawn))]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetTemperature(_device: *mut c_void, _sensor: c_uint, place: *mut c_uint) -> c_int {
    unsafe { withdrawn(place, 59) }
}

#[cfg(not(withdrawn))]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetCurrentClocksThrottleReasons(
    _device: *mut c_void,
    place: *mut c_ulonglong,
) -> c_int {
    unsafe { withdrawn(place, 4) }
}

/// Kept so that a build without withdrawn functions uses the same list of codes.
#[cfg(withdrawn)]
pub const NEVER_ANSWERED: c_int = DEPRECATED;
