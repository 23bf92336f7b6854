//! Static cells: the same requests again and again until the window is long enough. A decode cell prefills its
//! context once, in the warm-up, and then decodes from it in every pass: its sequences are put back between passes.

use super::summary::{self, Measured, Pass};
use super::trace::Trace;
use super::{Halt, Protocol, Stage, warmup_of};
use crate::engine::{Request, StepOutput};
use crate::record::{Run, Warmup, Workload};
use crate::workload;

/// Runs whole passes until the warm-up time is over, one at least. Leaves a decode cell's sequences in the engine.
pub(super) fn warm_up(
    stage: &mut Stage<'_>,
    workload: &Workload,
    protocol: &Protocol,
    trace: &mut Trace,
) -> Result<Warmup, Halt> {
    let requests = requests(stage, workload, protocol);
    let mut output = StepOutput::default();
    let begin_ns = stage.clock.now_ns();
    let mut passes = 0;
    while passes == 0 || stage.clock.now_ns() - begin_ns < protocol.warmup_ns {
        begin_pass(stage, &requests, passes == 0)?;
        stage.finish_all(&mut output, trace)?;
        passes += 1;
    }
    Ok(warmup_of(trace, stage.clock.now_ns() - begin_ns, passes * requests.len() as u64))
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
    Ok(stage.with_power(run, &pieces))
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
