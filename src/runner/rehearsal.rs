//! Before the warm-up of a serving cell: one step of each size at which the device makes something first (the choice of
//! an algorithm, the capture of a graph), so that none of it falls into a window. Static cells need none of this: their
//! warm-up meets every size that they have.

use super::trace::Trace;
use super::{Halt, Protocol, Stage};
use crate::backend::FirstSteps;
use crate::engine::{Request, StepOutput};
use crate::record::Workload;
use crate::workload;

/// Tokens that a decode step needs: the prompt's, and one for each step in flight after it.
const DECODED: u32 = 3;

/// Leaves the engine empty.
pub(super) fn rehearse(
    stage: &mut Stage<'_>,
    workload: &Workload,
    protocol: &Protocol,
    trace: &mut Trace,
) -> Result<(), Halt> {
    let FirstSteps { prefill_tokens, decode_sequences } = stage.engine.first_steps();
    let (isl, _) = workload.lengths();
    let isl = isl as usize;
    let at_once = match *workload {
        Workload::ServeClosed { concurrency, .. } => concurrency as usize,
        _ => stage.engine.info().limits.max_batch,
    };
    let prefills = prefill_tokens.into_iter().filter(|&tokens| tokens <= at_once * isl);
    let decodes = decode_sequences.into_iter().filter(|&sequences| sequences <= at_once);
    let steps = prefills
        .map(|tokens| (prompts_of(tokens, isl), 1))
        .chain(decodes.map(|sequences| (vec![1; sequences], DECODED)));
    for (prompts, max_tokens) in steps {
        for (id, prompt_tokens) in prompts.into_iter().enumerate() {
            let mut request: Request =
                workload::request(workload, id as u64, protocol.seed, stage.engine.info().vocab_size);
            request.prompt.truncate(prompt_tokens);
            request.max_tokens = max_tokens;
            stage.engine.submit(request).map_err(|error| Halt::Failed(error.into()))?;
        }
        stage.finish_all(&mut StepOutput::default(), trace)?;
    }
    stage.engine.reset()?;
    trace.clear();
    Ok(())
}

/// As few prompts as hold `tokens`, of at most `longest` each.
fn prompts_of(tokens: usize, longest: usize) -> Vec<usize> {
    let mut prompts = vec![longest; tokens / longest];
    prompts.extend(Some(tokens % longest).filter(|&rest| rest > 0));
    prompts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompts_hold_all_tokens_and_none_is_too_long() {
        assert_eq!(prompts_of(2048, 1000), [1000, 1000, 48]);
        assert_eq!(prompts_of(96, 1024), [96]);
        assert_eq!(prompts_of(128, 64), [64, 64]);
    }
}
