//! Chosen algorithms on disk. An entry names all that the choice depends on, so that one made elsewhere, or for
//! another product, is not taken for this one's; whether the library still accepts it is asked by whoever uses it.

use super::library::{ALGORITHM_WORDS, Algorithm};
use super::shape::ProductShape;
use crate::backend::CudaDType;
use crate::backend::cuda::cache::{self, Cache};

/// What a choice depends on beside the product.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Place {
    /// The device's name; a part of a card has one of its own.
    pub(super) device: String,
    pub(super) multiprocessors: u32,
    /// As CUDA encodes it.
    pub(super) driver_cuda_version: i32,
    pub(super) cublaslt_version: usize,
    pub(super) dtype: CudaDType,
    pub(super) workspace_bytes: usize,
}

impl Place {
    fn key(&self, shape: &ProductShape) -> String {
        let Place { device, multiprocessors, driver_cuda_version, cublaslt_version, dtype, workspace_bytes } =
            self;
        format!(
            "device {device}, {multiprocessors} multiprocessors\ndriver for CUDA {driver_cuda_version}\ncuBLASLt \
             {cublaslt_version}, {workspace_bytes} B of workspace\n{shape}, {}\n",
            dtype.name()
        )
    }
}

/// The entries for one device, driver and library.
#[derive(Debug)]
pub(super) struct Stored {
    cache: Option<Cache>,
    place: Place,
}

impl Stored {
    pub(super) fn new(cache: Option<Cache>, place: Place) -> Self {
        Stored { cache, place }
    }

    pub(super) fn get(&self, shape: &ProductShape) -> Option<Algorithm> {
        let key = self.place.key(shape);
        decode(&key, &self.cache.as_ref()?.get(&name(&key))?)
    }

    /// A disk that is full or read-only costs the next run the tuning.
    pub(super) fn put(&self, shape: &ProductShape, algorithm: Algorithm) {
        let key = self.place.key(shape);
        if let Some(cache) = &self.cache {
            let _ = cache.put(&name(&key), &encode(&key, algorithm));
        }
    }
}

fn name(key: &str) -> String {
    cache::digest([key.as_bytes()])
}

/// The key, and the algorithm's words in hexadecimal.
fn encode(key: &str, Algorithm(words): Algorithm) -> Vec<u8> {
    let words = words.map(|word| format!("{word:016x}"));
    format!("{key}{}\n", words.join(" ")).into_bytes()
}

fn decode(key: &str, content: &[u8]) -> Option<Algorithm> {
    let words = std::str::from_utf8(content).ok()?.strip_prefix(key)?.strip_suffix('\n')?;
    let words: Vec<u64> =
        words.split(' ').map(|word| u64::from_str_radix(word, 16).ok()).collect::<Option<_>>()?;
    Some(Algorithm(<[u64; ALGORITHM_WORDS]>::try_from(words).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cuda::kernels::Epilogue;

    const SHAPE: ProductShape =
        ProductShape { epilogue: Epilogue::Store, columns: 6144, depth: 4096, rows: 512 };
    const ALGORITHM: Algorithm = Algorithm([1, 2, 3, u64::MAX, 5, 6, 7, 0]);

    fn place() -> Place {
        Place {
            device: "NVIDIA H200".to_owned(),
            multiprocessors: 132,
            driver_cuda_version: 13_000,
            cublaslt_version: 130_100,
            dtype: CudaDType::Bf16,
            workspace_bytes: 1 << 25,
        }
    }

    #[test]
    fn the_key_follows_everything_that_the_choice_depends_on() {
        let mut keys = std::collections::BTreeSet::from([place().key(&SHAPE)]);
        for changed in [
            Place { device: "NVIDIA H100".to_owned(), ..place() },
            Place { multiprocessors: 66, ..place() },
            Place { driver_cuda_version: 13_010, ..place() },
            Place { cublaslt_version: 130_200, ..place() },
            Place { dtype: CudaDType::F16, ..place() },
            Place { workspace_bytes: 1 << 22, ..place() },
        ] {
            assert!(keys.insert(changed.key(&SHAPE)), "{changed:?} has a key that was there");
        }
        for changed in [
            ProductShape { epilogue: Epilogue::Residual, ..SHAPE },
            ProductShape { columns: 4096, ..SHAPE },
            ProductShape { depth: 6144, ..SHAPE },
            ProductShape { rows: 448, ..SHAPE },
        ] {
            assert!(keys.insert(place().key(&changed)), "{changed:?} has a key that was there");
        }
    }

    #[test]
    fn an_entry_is_found_again_for_the_same_product_only() {
        let dir = tempfile::tempdir().unwrap();
        let cache = || Some(Cache::at(cache::ALGORITHMS, dir.path()));
        let stored = Stored::new(cache(), place());
        assert_eq!(stored.get(&SHAPE), None);
        stored.put(&SHAPE, ALGORITHM);
        assert_eq!(stored.get(&SHAPE), Some(ALGORITHM));
        assert_eq!(stored.get(&ProductShape { rows: 448, ..SHAPE }), None);
        let elsewhere = Stored::new(cache(), Place { device: "NVIDIA H100".to_owned(), ..place() });
        assert_eq!(elsewhere.get(&SHAPE), None);
        assert_eq!(Stored::new(None, place()).get(&SHAPE), None);
    }

    #[test]
    fn an_entry_under_a_name_that_is_not_its_own_is_not_taken() {
        let content = encode(&place().key(&SHAPE), ALGORITHM);
        assert_eq!(decode(&place().key(&SHAPE), &content), Some(ALGORITHM));
        let other = ProductShape { rows: 448, ..SHAPE };
        assert_eq!(decode(&place().key(&other), &content), None);
    }

    #[test]
    fn words_that_are_too_few_too_many_or_none_are_not_taken() {
        for words in ["", "\n", "1 2 3\n", "1 2 3 4 5 6 7 8 9\n", "1 2 3 4 5 6 7 x\n", "1 2 3 4 5 6 7 8"] {
            assert_eq!(decode("key\n", format!("key\n{words}").as_bytes()), None, "{words:?}");
        }
        assert!(decode("key\n", b"key\n1 2 3 4 5 6 7 8\n").is_some());
    }
}
