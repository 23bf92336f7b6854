//! From queued work to a graph. A driver that refuses a capture with dependent launch is asked once more without: the
//! refusal is kept with the context, so that the record says what ran and no later capture tries again.

use super::context::Refusal;
use super::device::Cuda;
use super::error::CudaError;
use super::module::Graph;
use super::queue::Mode;

impl Cuda {
    /// What `body` queues becomes a graph and is not run; `body` may be called a second time.
    ///
    /// # Errors
    /// Those of `body`, or the driver's: where the second try fails too, those of the first.
    pub(super) fn capture(
        &mut self,
        mut body: impl FnMut(&mut Self) -> anyhow::Result<()>,
    ) -> anyhow::Result<Graph> {
        let overlap = self.queue.dependent_launch && self.context.refusal().is_none();
        let first = self.capture_once(overlap, &mut body);
        let Some(refusal) = first.as_ref().err().filter(|_| overlap).and_then(said_by_driver) else {
            return first;
        };
        let Ok(graph) = self.capture_once(false, &mut body) else { return first };
        // What runs from here on is what the record says: no graph of before.
        self.queue.forget()?;
        self.context.refused(refusal);
        Ok(graph)
    }

    fn capture_once(
        &mut self,
        overlap: bool,
        body: &mut impl FnMut(&mut Self) -> anyhow::Result<()>,
    ) -> anyhow::Result<Graph> {
        let stream = std::sync::Arc::clone(&self.queue.stream);
        self.queue.begin(Mode::Capture { overlap });
        let graph = Graph::capture(&stream, || body(self));
        // The notes stay: they say what the graph holds.
        self.queue.mode = Mode::Queue;
        graph
    }
}

/// What the driver said; none where the error is not the driver's.
fn said_by_driver(error: &anyhow::Error) -> Option<Refusal> {
    let error = error.chain().find_map(|cause| cause.downcast_ref::<CudaError>())?;
    Some(Refusal { error: error.name.clone(), call: error.call.clone() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_the_driver_said_is_a_refusal() {
        let error = CudaError {
            call: "launching rms_norm_bf16".to_owned(),
            name: "CUDA_ERROR_INVALID_HANDLE".to_owned(),
            text: "invalid resource handle".to_owned(),
        };
        let found = said_by_driver(&anyhow::Error::new(error).context("the product of 96 rows")).unwrap();
        assert_eq!((&*found.error, &*found.call), ("CUDA_ERROR_INVALID_HANDLE", "launching rms_norm_bf16"));
        let own = anyhow::anyhow!("the product of 96 rows was not seen before its capture");
        assert_eq!(said_by_driver(&own), None);
    }
}
