//! Power that something else wrote down: an external meter's file, aligned by the wall clock (`csv:FILE`), or a trace
//! on the run's own clock (`replay:FILE`), which makes runs of the scripted engine exact. A trace that does not cover
//! the window, or has a hole in it, gives no energy.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail, ensure};
use sha2::{Digest as _, Sha256};

use super::integral::integrate;
use super::sampler::{has_stepped, wall_offset_ns};
use super::samples::{PowerReading, Reason, Samples, Series};
use super::{PowerSensor, Quantity, SensorInfo};
use crate::clock::Clock;
use crate::record::{FileRecord, Maybe, MeteredDevice, hex};

/// Header of a replayed trace: seconds of the run's own clock.
const REPLAY_HEADER: &str = "t_s,watts";
/// Header of an external meter's file: seconds since 1970.
const EXTERNAL_HEADER: &str = "t_unix_s,watts";
/// Largest file that is read.
const LARGEST_FILE_BYTES: u64 = 256 << 20;
/// A gap this many times the usual one is a hole.
const HOLE_GAPS: f64 = 3.0;
/// How long an external meter may lag behind with writing, and how often its file is looked at.
const LAG_NS: u64 = 5_000_000_000;
const LOOK_NS: u64 = 250_000_000;

/// A trace and the clock that its times belong to.
pub struct TraceFile {
    path: PathBuf,
    is_external: bool,
    file: FileRecord,
    /// Times as in the file, ns.
    readings: Vec<(u64, f64)>,
    /// Wall time minus the run's clock, when the window began.
    offset_ns: i128,
}

impl TraceFile {
    /// A trace on the run's own clock, header `t_s,watts`.
    ///
    /// # Errors
    /// When the file cannot be read or says something else; the sentence names file and line.
    pub fn replay(path: &Path) -> anyhow::Result<Self> {
        Self::open(path, false)
    }

    /// An external meter's file on the wall clock, header `t_unix_s,watts`. It may grow while it is used.
    ///
    /// # Errors
    /// As [`TraceFile::replay`].
    pub fn external(path: &Path) -> anyhow::Result<Self> {
        Self::open(path, true)
    }

    fn open(path: &Path, is_external: bool) -> anyhow::Result<Self> {
        let (file, readings) = load(path, is_external).with_context(|| path.display().to_string())?;
        Ok(TraceFile { path: path.to_path_buf(), is_external, file, readings, offset_ns: 0 })
    }

    /// Reads an external meter's file again until it reaches beyond `until_ns`, or for [`LAG_NS`].
    fn catch_up(&mut self, clock: &Clock, until_ns: u64) -> Result<(), Reason> {
        let deadline_ns = clock.now_ns() + LAG_NS;
        loop {
            let (file, readings) = load(&self.path, true).map_err(|_| "trace_unreadable".to_owned())?;
            (self.file, self.readings) = (file, readings);
            let reached = self.readings.last().is_some_and(|(at_ns, _)| *at_ns >= until_ns);
            if reached || clock.now_ns() >= deadline_ns {
                return Ok(());
            }
            clock.sleep_until_ns(clock.now_ns() + LOOK_NS);
        }
    }

    /// The part of the trace that the window needs, on the run's clock.
    fn slice(&mut self, clock: &Clock, window_ns: (u64, u64)) -> Result<Vec<PowerReading>, Reason> {
        let offset_ns = if self.is_external { self.offset_ns } else { 0 };
        let in_file = |at_ns: u64| u64::try_from(i128::from(at_ns) + offset_ns).unwrap_or(0);
        let (from_ns, to_ns) = (in_file(window_ns.0), in_file(window_ns.1));
        if self.is_external {
            self.catch_up(clock, to_ns)?;
        }
        let times: Vec<u64> = self.readings.iter().map(|(at_ns, _)| *at_ns).collect();
        let first = times.partition_point(|at_ns| *at_ns <= from_ns);
        let last = times.partition_point(|at_ns| *at_ns < to_ns);
        if first == 0 {
            return Err("trace_begins_late".to_owned());
        }
        if last == times.len() {
            return Err("trace_ends_early".to_owned());
        }
        let gaps: Vec<u64> = times[first - 1..=last].windows(2).map(|pair| pair[1] - pair[0]).collect();
        if has_hole(&gaps, usual_gap_ns(&times)) {
            return Err("trace_has_hole".to_owned());
        }
        let needed = &self.readings[first - 1..=last];
        let on_clock = |at_ns: u64| u64::try_from(i128::from(at_ns) - offset_ns).unwrap_or(0);
        let reading =
            |(at_ns, power_w): &(u64, f64)| PowerReading { at_ns: on_clock(*at_ns), power_w: *power_w };
        Ok(needed.iter().map(reading).collect())
    }
}

fn usual_gap_ns(times: &[u64]) -> u64 {
    let mut gaps: Vec<u64> = times.windows(2).map(|pair| pair[1] - pair[0]).collect();
    gaps.sort_unstable();
    gaps.get(gaps.len() / 2).copied().unwrap_or(0)
}

fn has_hole(gaps: &[u64], usual_ns: u64) -> bool {
    gaps.iter().any(|gap_ns| *gap_ns as f64 > HOLE_GAPS * usual_ns as f64)
}

fn load(path: &Path, is_external: bool) -> anyhow::Result<(FileRecord, Vec<(u64, f64)>)> {
    let size_bytes = std::fs::metadata(path)?.len();
    ensure!(
        size_bytes <= LARGEST_FILE_BYTES,
        "holds {size_bytes} bytes, expected at most {LARGEST_FILE_BYTES}"
    );
    let bytes = std::fs::read(path)?;
    let name = path.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
    let sha256 = Maybe::Value(hex(&Sha256::digest(&bytes)));
    let text = String::from_utf8(bytes).context("is no text")?;
    let file = FileRecord { name, size_bytes: text.len() as u64, sha256 };
    Ok((file, parse(&text, is_external)?))
}

/// Lines of time and watts below their header, in strictly growing order. A last line without an end is still being
/// written and does not count.
fn parse(text: &str, is_external: bool) -> anyhow::Result<Vec<(u64, f64)>> {
    let header = if is_external { EXTERNAL_HEADER } else { REPLAY_HEADER };
    let whole = &text[..text.rfind('\n').map_or(0, |end| end + 1)];
    let mut lines = whole.lines().enumerate();
    let found = lines.next().map_or("", |(_, line)| line.trim());
    ensure!(found == header, "line 1 is '{found}', expected the header {header}");
    let mut readings: Vec<(u64, f64)> = Vec::new();
    for (index, line) in lines {
        let place = index + 1;
        let expected = || format!("line {place} is '{line}', expected seconds and watts such as 1.25,431.5");
        let (time, watts) = line.split_once(',').with_context(expected)?;
        let at_ns = nanos(time.trim()).with_context(expected)?;
        let power_w: f64 =
            watts.trim().parse().ok().filter(|w: &f64| w.is_finite()).with_context(expected)?;
        if !(0.0..=1e8).contains(&power_w) {
            bail!("line {place} says {power_w} W, expected 0 to 100000000");
        }
        if readings.last().is_some_and(|(last_ns, _)| *last_ns >= at_ns) {
            bail!("line {place} is not later than the line before");
        }
        readings.push((at_ns, power_w));
    }
    Ok(readings)
}

/// Decimal seconds as whole nanoseconds, exactly: a float would lose the nanoseconds of a Unix time.
fn nanos(text: &str) -> Option<u64> {
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let is_digits = |part: &str| part.bytes().all(|byte| byte.is_ascii_digit());
    if whole.is_empty() || !is_digits(whole) || !is_digits(fraction) {
        return None;
    }
    let fraction: String = fraction.chars().chain("000000000".chars()).take(9).collect();
    whole.parse::<u64>().ok()?.checked_mul(1_000_000_000)?.checked_add(fraction.parse().ok()?)
}

impl PowerSensor for TraceFile {
    fn info(&self) -> SensorInfo {
        let missing = || "not_known".to_owned();
        SensorInfo {
            source: if self.is_external { "external" } else { "replay" },
            scope: "node",
            quantity: Quantity::Power,
            devices: vec![MeteredDevice {
                device: self.file.name.clone(),
                update_period_ns: Maybe::missing("no_counter"),
                power_limit_w: Maybe::missing(missing()),
                shared: Maybe::missing(missing()),
            }],
            systematic_share: Maybe::missing(missing()),
            shortest_window_ns: 0,
            idle_floor_w: None,
            trace: Maybe::Value(self.file.clone()),
        }
    }

    fn begin(&mut self, clock: &Clock) {
        self.offset_ns = wall_offset_ns(clock);
    }

    fn end(&mut self) {}

    fn collect(&mut self, clock: &Clock, window_ns: (u64, u64)) -> Samples {
        let power = self.slice(clock, window_ns).and_then(|readings| {
            // Looked at here already, so that an empty trace has its own reason.
            integrate(&readings, window_ns.0, window_ns.1)?;
            Ok(readings)
        });
        let series = Series { counter: Err("no_counter".to_owned()), power, states: Vec::new() };
        let clock_stepped = self.is_external && has_stepped(self.offset_ns, clock);
        Samples { series: vec![series], sampler_cpu_ns: Maybe::missing("no_sampler"), clock_stepped }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: u64 = 1_000_000_000;

    fn trace(text: &str) -> (tempfile::TempDir, TraceFile) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("power.csv");
        std::fs::write(&path, text).unwrap();
        let file = TraceFile::replay(&path).unwrap();
        (dir, file)
    }

    fn power(file: &mut TraceFile, from_s: u64, to_s: u64) -> Result<f64, Reason> {
        let window_ns = (from_s * S, to_s * S);
        let samples = file.collect(&Clock::scripted(), window_ns);
        let readings = samples.series[0].power.clone()?;
        Ok(integrate(&readings, window_ns.0, window_ns.1)?.energy_j)
    }

    #[test]
    fn the_window_is_cut_out_of_the_trace() {
        let lines: String = (0..=20).map(|k| format!("{}.5,{}\n", k, 100 + 10 * k)).collect();
        let (_dir, mut file) = trace(&format!("t_s,watts\n{lines}"));
        // From 2 s to 12 s power goes from 115 W to 215 W.
        assert!((power(&mut file, 2, 12).unwrap() - 1650.0).abs() < 1e-9);
        assert_eq!(power(&mut file, 0, 12), Err("trace_begins_late".to_owned()));
        assert_eq!(power(&mut file, 2, 30), Err("trace_ends_early".to_owned()));
    }

    #[test]
    fn a_hole_in_the_window_is_no_energy_and_one_outside_does_no_harm() {
        let lines: String =
            (0..=40).filter(|k| !(10..=14).contains(k)).map(|k| format!("{k},200\n")).collect();
        let (_dir, mut file) = trace(&format!("t_s,watts\n{lines}"));
        assert_eq!(power(&mut file, 5, 25), Err("trace_has_hole".to_owned()));
        assert_eq!(power(&mut file, 16, 26), Ok(2000.0));
    }

    #[test]
    fn a_file_that_is_no_trace_is_refused_with_its_line() {
        let refuse = |text: &str, is_external| format!("{:#}", parse(text, is_external).unwrap_err());
        assert!(refuse("", false).contains("line 1 is '', expected the header t_s,watts"));
        assert!(refuse("t_s,watts\n", true).contains("expected the header t_unix_s,watts"));
        for (line, expected) in [
            ("1;5", "line 3 is '1;5', expected seconds and watts"),
            ("1e3,5", "expected seconds and watts"),
            ("2,NaN", "expected seconds and watts"),
            ("2,-5", "line 3 says -5 W"),
            ("1,5", "line 3 is not later"),
        ] {
            let found = refuse(&format!("t_s,watts\n1,5\n{line}\n"), false);
            assert!(found.contains(expected), "{found}");
        }
        assert_eq!(parse("t_s,watts\n1,5\n2,", false).unwrap(), [(S, 5.0)], "the last line is not whole yet");
    }

    #[test]
    fn a_unix_time_keeps_its_nanoseconds() {
        assert_eq!(nanos("1795392000.123456789"), Some(1_795_392_000_123_456_789));
        assert_eq!(
            (nanos("7"), nanos("7.5"), nanos("-1"), nanos("")),
            (Some(7 * S), Some(7 * S + S / 2), None, None)
        );
    }

    #[test]
    fn an_external_meter_is_aligned_by_the_wall_clock() {
        let clock = Clock::scripted();
        let zero_s = clock.unix_ns() / 1_000_000_000;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("wall.csv");
        let lines: String =
            (0..40).map(|k| format!("{},{}\n", zero_s + k, if k < 20 { 100 } else { 300 })).collect();
        std::fs::write(&path, format!("t_unix_s,watts\n{lines}")).unwrap();
        let mut file = TraceFile::external(&path).unwrap();
        file.begin(&clock);
        let energy = |file: &mut TraceFile, from_s: u64, to_s: u64| {
            let samples = file.collect(&clock, (from_s * S, to_s * S));
            samples.series[0]
                .power
                .clone()
                .map(|power| integrate(&power, from_s * S, to_s * S).unwrap().energy_j)
        };
        assert_eq!(energy(&mut file, 5, 15), Ok(1000.0));
        assert_eq!(energy(&mut file, 25, 35), Ok(3000.0));
        assert_eq!(
            energy(&mut file, 25, 45),
            Err("trace_ends_early".to_owned()),
            "after waiting for the meter"
        );
    }
}
