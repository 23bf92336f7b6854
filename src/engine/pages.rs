//! Who owns which page of the KV cache, and how many pages a length or a memory size comes to. Only integers: the
//! keys and values themselves are the backend's.

use anyhow::ensure;

use super::EngineLimits;
use crate::backend::PAGE_SIZE;

/// Pages owned by one sequence, in the order of its tokens. It cannot be cloned and [`Pages::free`] takes it by
/// value, so no page can have two owners or be freed twice.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct PageList(Vec<u32>);

impl PageList {
    pub fn as_slice(&self) -> &[u32] {
        &self.0
    }
}

/// The free list. Taking and giving back cost O(1) per page.
#[derive(Debug)]
pub struct Pages {
    /// Used as a stack: the page freed last, the likeliest to be in a cache, is taken first.
    free: Vec<u32>,
    total: usize,
}

impl Pages {
    pub fn new(total: usize) -> Self {
        Pages { free: (0..total as u32).rev().collect(), total }
    }

    /// `count` pages, or nothing when fewer are free.
    pub fn alloc(&mut self, count: usize) -> Option<PageList> {
        let rest = self.free.len().checked_sub(count)?;
        let mut pages = self.free.split_off(rest);
        pages.reverse();
        Some(PageList(pages))
    }

    pub fn free(&mut self, pages: PageList) {
        self.free.extend(pages.0.iter().rev());
        debug_assert!(self.free.len() <= self.total, "a page was freed twice");
    }

    pub fn free_pages(&self) -> usize {
        self.free.len()
    }

    pub fn total(&self) -> usize {
        self.total
    }
}

/// Pages that a sequence of `tokens` tokens needs.
pub fn pages_needed(tokens: usize) -> usize {
    tokens.div_ceil(PAGE_SIZE)
}

/// Pages that fit into `memory_bytes`, at [`crate::backend::Backend::page_bytes`] each.
///
/// # Errors
/// When not even one does; says how much one page takes.
pub fn pages_for(memory_bytes: u64, page_bytes: u64) -> anyhow::Result<usize> {
    let pages = memory_bytes / page_bytes.max(1);
    ensure!(
        pages > 0,
        "KV memory is {memory_bytes} bytes, expected at least {page_bytes} bytes, one page of {PAGE_SIZE} tokens"
    );
    Ok(usize::try_from(pages).unwrap_or(usize::MAX).min(EngineLimits::MOST_PAGES))
}

/// Refuses a batch whose sequences cannot all be in the cache at once.
///
/// # Errors
/// Says what would fit: the batch that this cache holds, and the memory that this batch needs.
pub fn check_batch_fits(
    pages: usize,
    page_bytes: u64,
    sequences: usize,
    tokens_each: usize,
) -> anyhow::Result<()> {
    let each = pages_needed(tokens_each).max(1);
    let needed = sequences.saturating_mul(each);
    let needed_bytes = (needed as u64).saturating_mul(page_bytes);
    ensure!(
        needed <= pages,
        "a batch of {sequences} sequences of {tokens_each} tokens needs {needed} KV pages, but the cache has {pages}\n\
         hint: a batch of {} fits, or give the cache {needed_bytes} bytes",
        pages / each
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_owns_distinct_pages_until_it_is_freed() {
        let mut pages = Pages::new(5);
        let first = pages.alloc(2).unwrap();
        let second = pages.alloc(3).unwrap();
        let mut all = [first.as_slice(), second.as_slice()].concat();
        all.sort_unstable();
        assert_eq!(all, [0, 1, 2, 3, 4]);
        assert_eq!(pages.free_pages(), 0);
        assert_eq!(pages.alloc(1), None);
        pages.free(first);
        assert_eq!(pages.free_pages(), 2);
        assert_eq!(pages.alloc(3), None, "more than is free is refused and takes nothing");
        assert_eq!(pages.free_pages(), 2);
        assert_eq!(pages.alloc(2).unwrap().as_slice(), [0, 1]);
    }

    #[test]
    fn a_length_takes_whole_pages() {
        assert_eq!([0, 1, 16, 17].map(pages_needed), [0, 1, 1, 2]);
    }

    #[test]
    fn memory_below_one_page_is_an_error_that_says_what_a_page_takes() {
        assert_eq!(pages_for(1000, 300).unwrap(), 3);
        assert_eq!(
            pages_for(299, 300).unwrap_err().to_string(),
            "KV memory is 299 bytes, expected at least 300 bytes, one page of 16 tokens"
        );
    }

    #[test]
    fn a_batch_too_large_for_the_cache_is_told_what_would_fit() {
        check_batch_fits(6, 100, 3, 32).unwrap();
        assert_eq!(
            check_batch_fits(6, 100, 4, 32).unwrap_err().to_string(),
            "a batch of 4 sequences of 32 tokens needs 8 KV pages, but the cache has 6\n\
             hint: a batch of 3 fits, or give the cache 800 bytes"
        );
    }
}
