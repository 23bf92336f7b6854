//! The Hugging Face hub over HTTPS: what it announces of a file, and the file's bytes. Every wait is bounded; what
//! comes is checked by the caller.

use std::io::Read;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context as _, bail, ensure};
use ureq::http::{Response, StatusCode};
use ureq::tls::{PemItem, RootCerts, TlsConfig, TlsProvider};
use ureq::{Agent, Body};

use super::{Environment, Patience, RemoteFile};
use crate::weights::registry::is_sha256;

/// A file whose size nobody stated (configurations, tokenizers) may not be larger.
const UNANNOUNCED_BYTES: u64 = 256 << 20;

pub(crate) struct Hub<'e> {
    agent: Agent,
    environment: &'e Environment,
    patience: &'e Patience,
}

/// Bytes on their way, and how many may come.
pub(crate) struct Download {
    pub(crate) reader: Box<dyn Read>,
    pub(crate) most_bytes: u64,
}

impl<'e> Hub<'e> {
    pub(crate) fn connect(environment: &'e Environment, patience: &'e Patience) -> anyhow::Result<Self> {
        let secure = environment.hub_endpoint.starts_with("https://");
        ensure!(
            secure || environment.hub_endpoint.starts_with("http://"),
            "HF_ENDPOINT is {:?}, expected an http:// or https:// address",
            environment.hub_endpoint
        );
        // The TLS library would end the program.
        ensure!(
            !secure || graviola::util::is_cpu_supported(),
            "this CPU lacks the instructions that our TLS needs"
        );
        let tls = TlsConfig::builder()
            .provider(TlsProvider::Rustls)
            .root_certs(trusted(environment.certificates.as_deref())?)
            .unversioned_rustls_crypto_provider(Arc::new(rustls_graviola::default_provider()))
            .build();
        let agent = Agent::config_builder()
            .tls_config(tls)
            .https_only(secure)
            .http_status_as_error(false)
            .proxy(environment.proxy.clone())
            .user_agent(concat!("tokmeter/", env!("CARGO_PKG_VERSION")))
            .timeout_resolve(Some(patience.hub_answer))
            .timeout_connect(Some(patience.hub_answer))
            .timeout_recv_response(Some(patience.stall))
            .timeout_per_read(Some(patience.stall))
            .build()
            .new_agent();
        Ok(Self { agent, environment, patience })
    }

    /// The wanted file with size and sha256 filled in from what the hub announces.
    ///
    /// # Errors
    /// When the hub does not answer in time, refuses, or announces another file than the wanted one.
    pub(crate) fn announce(
        &self,
        repo: &str,
        revision: &str,
        wanted: &RemoteFile,
    ) -> anyhow::Result<RemoteFile> {
        let mut request = self
            .agent
            .head(self.url(repo, revision, wanted))
            .config()
            .max_redirects(0) // the announcement is in the redirect itself
            .timeout_global(Some(self.patience.hub_answer))
            .build();
        if let Some(token) = self.authorization() {
            request = request.header("authorization", token);
        }
        let response = request.call().map_err(in_words)?;
        check_status(&response, repo)?;
        let header = |name| response.headers().get(name).and_then(|value| value.to_str().ok());
        let sha256 =
            header("x-linked-etag").map(|tag| tag.trim_start_matches("W/").trim_matches('"').to_owned());
        let bytes = header("x-linked-size").and_then(|size| size.parse().ok());
        Ok(RemoteFile {
            path: wanted.path.clone(),
            bytes: agree("size", wanted.bytes, bytes)?,
            sha256: agree("sha256", wanted.sha256.clone(), sha256.filter(|tag| is_sha256(tag)))?,
        })
    }

    /// Begins the download.
    pub(crate) fn open(&self, repo: &str, revision: &str, wanted: &RemoteFile) -> anyhow::Result<Download> {
        let mut request = self.agent.get(self.url(repo, revision, wanted));
        if let Some(token) = self.authorization() {
            request = request.header("authorization", token);
        }
        let response = request.call().map_err(in_words)?;
        check_status(&response, repo)?;
        let length = response.body().content_length();
        let most_bytes = wanted.bytes.or(length).unwrap_or(UNANNOUNCED_BYTES);
        Ok(Download { reader: Box::new(response.into_body().into_reader()), most_bytes })
    }

    fn url(&self, repo: &str, revision: &str, file: &RemoteFile) -> String {
        format!("{}/{repo}/resolve/{revision}/{}", self.environment.hub_endpoint, file.path)
    }

    /// The token goes to the hub only (not where it redirects to), and never in the clear over a network.
    fn authorization(&self) -> Option<String> {
        let endpoint = &self.environment.hub_endpoint;
        let here = ["http://127.0.0.1", "http://localhost", "http://[::1]"];
        let private = endpoint.starts_with("https://") || here.iter().any(|own| endpoint.starts_with(own));
        self.environment.hub_token.as_ref().filter(|_| private).map(|token| format!("Bearer {token}"))
    }
}

/// The certificates of a site's own mirror, or those of the public web.
fn trusted(file: Option<&Path>) -> anyhow::Result<RootCerts> {
    let Some(file) = file else { return Ok(RootCerts::WebPki) };
    let text = std::fs::read(file).with_context(|| format!("SSL_CERT_FILE {}", file.display()))?;
    let mut certificates = Vec::new();
    for item in ureq::tls::parse_pem(&text) {
        if let PemItem::Certificate(certificate) =
            item.with_context(|| format!("SSL_CERT_FILE {}", file.display()))?
        {
            certificates.push(certificate);
        }
    }
    ensure!(!certificates.is_empty(), "SSL_CERT_FILE {} holds no certificate", file.display());
    Ok(certificates.into())
}

/// Both sides' word on a value, if they agree.
fn agree<T: PartialEq + std::fmt::Display>(
    what: &str,
    wanted: Option<T>,
    announced: Option<T>,
) -> anyhow::Result<Option<T>> {
    match (wanted, announced) {
        (Some(wanted), Some(announced)) if wanted != announced => {
            bail!("announces {what} {announced}, expected {wanted}")
        }
        (wanted, announced) => Ok(wanted.or(announced)),
    }
}

fn check_status(response: &Response<Body>, repo: &str) -> anyhow::Result<()> {
    let status = response.status();
    match status {
        _ if status.is_success() || status.is_redirection() => Ok(()),
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
            bail!("answered {status} (accept the licence of {repo} on the hub, then set HF_TOKEN)")
        }
        _ => bail!("answered {status}"),
    }
}

fn in_words(error: ureq::Error) -> anyhow::Error {
    match error {
        ureq::Error::Timeout(_) => anyhow::anyhow!("no answer in time"),
        ureq::Error::HostNotFound => anyhow::anyhow!("host not found"),
        other => anyhow::Error::from(other),
    }
    .context("cannot reach the hub")
}
