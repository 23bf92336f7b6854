//! Sampled tokens: the device keeps the last step's for the next one to read, the host gets a copy of each step's in
//! pinned memory, marked by an event, and takes them oldest first.

use std::collections::VecDeque;

use anyhow::{Context as _, bail};

use super::context::{Event, Stream};
use super::memory::{DeviceBuffer, Pinned};

/// A step whose tokens were not taken yet.
#[derive(Debug)]
struct Slot {
    pinned: Pinned,
    arrived: Event,
    count: usize,
}

#[derive(Debug)]
pub(super) struct Samples {
    /// `[capacity]`; −1 where there was no finite logit.
    device: DeviceBuffer<i32>,
    /// Samples of the last step.
    last: usize,
    waiting: VecDeque<Slot>,
    spare: Vec<Slot>,
}

impl Samples {
    pub(super) fn new(stream: &Stream, capacity: usize) -> anyhow::Result<Self> {
        let device = DeviceBuffer::new(stream, capacity, "sampled tokens")?;
        Ok(Samples { device, last: 0, waiting: VecDeque::new(), spare: Vec::new() })
    }

    /// Makes room for `rows` samples a step. Those of the last step are lost when it grows.
    pub(super) fn reserve(&mut self, stream: &Stream, rows: usize) -> anyhow::Result<()> {
        if rows > self.device.len() {
            self.device = DeviceBuffer::new(stream, rows, "sampled tokens")?;
            self.last = 0;
        }
        Ok(())
    }

    pub(super) fn address(&self) -> u64 {
        self.device.address()
    }

    pub(super) fn capacity(&self) -> usize {
        self.device.len()
    }

    /// Samples of the last step, which the next may refer to.
    pub(super) fn last(&self) -> usize {
        self.last
    }

    /// Queues the way of the first `count` samples to the host.
    pub(super) fn push(&mut self, stream: &Stream, count: usize) -> anyhow::Result<()> {
        let mut slot = match self.spare.pop() {
            Some(slot) if slot.pinned.capacity::<i32>() >= count => slot,
            _ => self.slot(stream, count)?,
        };
        slot.count = count;
        if count > 0 {
            self.device.copy_to(stream, 0, &slot.pinned, count)?;
        }
        slot.arrived.record(stream)?;
        self.waiting.push_back(slot);
        self.last = count;
        Ok(())
    }

    fn slot(&self, stream: &Stream, count: usize) -> anyhow::Result<Slot> {
        let pinned = Pinned::new(stream.context(), self.capacity().max(count) * size_of::<i32>())?;
        Ok(Slot { pinned, arrived: Event::new(stream.context())?, count })
    }

    /// Waits for the oldest step and moves its tokens to `out`.
    ///
    /// # Errors
    /// When no step is waiting, the device failed, or a row had no finite logit.
    pub(super) fn take(&mut self, out: &mut Vec<u32>) -> anyhow::Result<()> {
        let slot = self.waiting.pop_front().context("no step is waiting for its samples to be taken")?;
        slot.arrived.synchronize()?;
        let tokens = &slot.pinned.as_slice::<i32>()[..slot.count];
        for (row, &token) in tokens.iter().enumerate() {
            match u32::try_from(token) {
                Ok(token) => out.push(token),
                Err(_) => bail!("the logits of sample {row} are not numbers, expected finite values"),
            }
        }
        self.spare.push(slot);
        Ok(())
    }
}
