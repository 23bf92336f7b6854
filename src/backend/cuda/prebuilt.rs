//! The names under which kernels compiled beforehand lie in `kernels/prebuilt/`, and the packed form in which a binary
//! carries them. The build script includes this file too, so that both mean the same; scripts/nvrtc.py says the names in
//! Python. What a build embeds is decided in build/prebuilt.rs, which image is loaded in `compile`.

use std::io::{Read as _, Write as _};

use flate2::Compression;
use flate2::read::DeflateDecoder;
use flate2::write::DeflateEncoder;
use sha2::{Digest as _, Sha256};

/// What the sources include.
pub const HEADERS: [&str; 2] = ["common.cuh", "ptx.cuh"];

/// Options beside the architecture.
pub const OPTIONS: [&str; 2] = ["--std=c++17", "-default-device"];

/// A packed image begins with the SHA-256 of the image and its length, eight bytes, the least first; the rest is its
/// DEFLATE stream.
const DIGEST_BYTES: usize = 32;
const HEAD_BYTES: usize = DIGEST_BYTES + size_of::<u64>();

/// SHA-256 of `parts`, each preceded by its length so that no two lists of parts look alike; in hexadecimal.
pub fn digest<'a>(parts: impl IntoIterator<Item = &'a [u8]>) -> String {
    let mut hasher = Sha256::new();
    for part in parts {
        hasher.update((part.len() as u64).to_le_bytes());
        hasher.update(part);
    }
    hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// What the text of a kernel depends on: the options, its source and the texts of [`HEADERS`].
pub fn source_key(source: &[u8], headers: &[impl AsRef<[u8]>; HEADERS.len()]) -> String {
    let options = OPTIONS.join("\n");
    let headers = HEADERS.iter().zip(headers).flat_map(|(name, text)| [name.as_bytes(), text.as_ref()]);
    digest([options.as_bytes(), source].into_iter().chain(headers))
}

/// The file of `kernels/prebuilt/`, without `.cubin`.
pub fn image_name(kernel: &str, architecture: &str, key: &str) -> String {
    format!("{kernel}.{architecture}.{key}")
}

#[allow(dead_code)] // the build script's half
pub fn pack(image: &[u8]) -> std::io::Result<Vec<u8>> {
    let mut packed = Sha256::digest(image).to_vec();
    packed.extend((image.len() as u64).to_le_bytes());
    let mut encoder = DeflateEncoder::new(packed, Compression::best());
    encoder.write_all(image)?;
    encoder.finish()
}

/// The image that was packed; none when it is not the very same.
pub fn unpack(packed: &[u8]) -> Option<Vec<u8>> {
    let (head, stream) = packed.split_at_checked(HEAD_BYTES)?;
    let (digest, length) = head.split_at(DIGEST_BYTES);
    let length = u64::from_le_bytes(length.try_into().ok()?);
    let mut image = Vec::new();
    // One byte more than there should be shows that there is more; the length is only believed once it is there.
    DeflateDecoder::new(stream).take(length.saturating_add(1)).read_to_end(&mut image).ok()?;
    (image.len() as u64 == length && Sha256::digest(&image)[..] == *digest).then_some(image)
}
