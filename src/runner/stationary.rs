//! Static cells: the same requests again and again until the window is long enough. A decode cell prefills its
//! context once, in the warm-up, and then decodes from it in every pass: its sequences are put back between passes.

use super::summary::{self, Measured, Pass};
use super::trace::Trace;
use super::warmup::{self, Stretch};
use super::{Halt, Protocol, Stage, steady, warmup_of};
use crate::engine::{Request, StepOutput};
use crate::meter::Piece;
use crate::record::{Run, Warmup, WarmupEnd, Workload};
use crate::workload;

/// Runs whole passes, one at least, until the warm-up time is over or until they are flat. Leaves a decode cell's sequences in the engine.
pub(super) fn warm_up(
    stage: &mut Stage<'_>,
    workload: &Workload,
    protocol: &Protocol,
    trace: &mut Trace,
) -> Result<Warmup, Halt> {
    let requests = requests(stage, workload, protocol);
    let mut output = StepOutput::default();
    let begin_ns = stage.clock.now_ns();
    begin_pass(stage, &requests, true)?;
    stage.finish_all(&mut output, trace)?;
    let mut passes = 1;
    let mut work = |stage: &mut Stage<'_>, stretch: &Stretch| {
        let mut times_ns = Vec::new();
        let mut pass_ns = stage.clock.now_ns();
        while !stretch.is_over(pass_ns, times_ns.len()) {
            begin_pass(stage, &requests, false)?;
            stage.finish_all(&mut output, trace)?;
            let now_ns = stage.clock.now_ns();
            times_ns.push(now_ns - pass_ns);
            pass_ns = now_ns;
        }
        passes += times_ns.len() as u64;
        Ok(times_ns)
    };
    let ended = if protocol.steady {
        warmup::until_flat(stage, protocol, begin_ns, work)?
    } else {
        work(stage, &Stretch::fixed(begin_ns + protocol.warmup_ns))?;
        WarmupEnd::Fixed
    };
    Ok(warmup_of(trace, stage.clock.now_ns() - begin_ns, passes * requests.len() as u64, ended))
}

/// One window of whole passes.
pub(super) fn run(
    stage: &mut Stage<'_>,
    workload: &Workload,
    protocol: &Protocol,
    index: u32,
    trace: &mut Trace,
) -> Result<Run, Halt> {
    let requests = requests(stage, workload, protocol);
    let mut output = StepOutput::default();
    let mut passes = Vec::new();
    if stage.shift_phase(protocol, index) {
        begin_pass(stage, &requests, false)?;
        stage.finish_all(&mut output, &mut Trace::default())?;
    }
    stage.witness.window_opens(&stage.clock);
    let t0_ns = stage.clock.now_ns();
    loop {
        let begin_ns = stage.clock.now_ns();
        passes.push(Pass { begin_ns, events_begin: trace.events.len() });
        begin_pass(stage, &requests, false)?;
        stage.finish_all(&mut output, trace)?;
        if stage.clock.now_ns() - t0_ns >= protocol.min_window_ns {
            break;
        }
    }
    let cpu = stage.witness.window_closes();
    let t1_ns = trace.steps.last().map_or(t0_ns, |step| step.visible_ns);
    let pieces = summary::pieces_of_passes(workload, &passes, t1_ns);
    let run = summary::of_passes(workload, trace, &passes, Measured { t0_ns, t1_ns, cpu });
    let run = if protocol.steady { Run { steady: steady::class_of(&times_ns(&pieces)), ..run } } else { run };
    Ok(stage.with_power(run, &pieces))
}

fn times_ns(pieces: &[Piece]) -> Vec<u64> {
    pieces.iter().map(|piece| piece.end_ns - piece.begin_ns).collect()
}

fn requests(stage: &Stage<'_>, workload: &Workload, protocol: &Protocol) -> Vec<Request> {
    let vocab_size = stage.engine.info().vocab_size;
    (0..u64::from(workload.static_batch().unwrap_or(0)))
        .map(|id| workload::request(workload, id, protocol.seed, vocab_size))
        .collect()
}

fn begin_pass(stage: &mut Stage<'_>, requests: &[Request], first: bool) -> Result<(), Halt> {
    for request in requests {
        if request.hold && !first {
            stage.engine.rewind(request.id);
        } else {
            stage.engine.submit(request.clone()).map_err(|error| Halt::Failed(error.into()))?;
        }
    }
    Ok(())
}
