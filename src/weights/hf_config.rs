//! From Hugging Face's `config.json` to a [`Config`], with the library's own defaults. What would change the result and
//! is not supported is refused by name; everything else in the file is ignored.

use std::path::Path;

use anyhow::{Context as _, bail};
use serde_json::Value;

use super::mapped::read_text;
use crate::arch::{Architecture, Config, Rope, RopeScaling};

const MAX_CONFIG_BYTES: u64 = 16 << 20;

/// # Errors
/// Names the file and the field.
pub fn read(path: &Path) -> anyhow::Result<Config> {
    let text = read_text(path, MAX_CONFIG_BYTES)?;
    parse(&text).with_context(|| path.display().to_string())
}

/// # Errors
/// Names the field.
pub fn parse(text: &str) -> anyhow::Result<Config> {
    let json: Value = serde_json::from_str(text).context("is not JSON")?;
    if !json.is_object() {
        bail!("is not a JSON object");
    }
    let fields = Fields { json: &json, within: "" };
    let architecture = architecture(&fields)?;
    refuse_variants(&fields, architecture)?;
    let hidden_size = fields.size("hidden_size")?;
    let num_attention_heads = fields.size("num_attention_heads")?;
    let max_position_embeddings = fields.size("max_position_embeddings")?;
    refuse_sliding_window(&fields, architecture, max_position_embeddings)?;
    let config = Config {
        architecture,
        hidden_size,
        intermediate_size: fields.size("intermediate_size")?,
        num_hidden_layers: fields.size("num_hidden_layers")?,
        num_attention_heads,
        num_key_value_heads: fields.optional_size("num_key_value_heads")?.unwrap_or(num_attention_heads),
        head_dim: head_dim(&fields, architecture, hidden_size, num_attention_heads)?,
        vocab_size: fields.size("vocab_size")?,
        max_position_embeddings,
        rms_norm_eps: fields.number("rms_norm_eps")?.unwrap_or(1e-6),
        rope: rope(&fields)?,
        tie_word_embeddings: fields.boolean("tie_word_embeddings")?.unwrap_or(false),
    };
    config.check()?;
    Ok(config)
}

/// An object's fields, read with errors that name them. `null` counts as absent.
struct Fields<'a> {
    json: &'a Value,
    /// `rope_scaling.` inside that object.
    within: &'static str,
}

impl<'a> Fields<'a> {
    fn get(&self, name: &str) -> Option<&'a Value> {
        self.json.get(name).filter(|value| !value.is_null())
    }

    fn read<T>(
        &self,
        name: &str,
        expected: &str,
        convert: impl Fn(&'a Value) -> Option<T>,
    ) -> anyhow::Result<Option<T>> {
        let Some(value) = self.get(name) else { return Ok(None) };
        match convert(value) {
            Some(converted) => Ok(Some(converted)),
            None => bail!("{}{name} is {}, expected {expected}", self.within, excerpt(value)),
        }
    }

    fn optional_size(&self, name: &str) -> anyhow::Result<Option<usize>> {
        self.read(name, "a non-negative integer", |value| value.as_u64().map(|size| size as usize))
    }

    fn size(&self, name: &str) -> anyhow::Result<usize> {
        self.optional_size(name)?.with_context(|| format!("{}{name} is missing", self.within))
    }

    fn number(&self, name: &str) -> anyhow::Result<Option<f64>> {
        self.read(name, "a number", Value::as_f64)
    }

    fn boolean(&self, name: &str) -> anyhow::Result<Option<bool>> {
        self.read(name, "true or false", Value::as_bool)
    }

    fn text(&self, name: &str) -> anyhow::Result<Option<&'a str>> {
        self.read(name, "a string", Value::as_str)
    }

    fn object(&self, name: &'static str, within: &'static str) -> anyhow::Result<Option<Fields<'a>>> {
        self.read(name, "an object", |value| value.is_object().then_some(Fields { json: value, within }))
    }
}

/// A value as an error can show it.
fn excerpt(value: &Value) -> String {
    const MAX_CHARS: usize = 60;
    let text = value.to_string();
    match text.char_indices().nth(MAX_CHARS) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

fn architecture(fields: &Fields<'_>) -> anyhow::Result<Architecture> {
    const EXPECTED: &str =
        "one of LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM and Qwen3ForCausalLM";
    let names = fields
        .read("architectures", "a list", Value::as_array)?
        .with_context(|| format!("architectures is missing, expected {EXPECTED}"))?;
    Ok(match names.first().and_then(Value::as_str) {
        Some("LlamaForCausalLM") => Architecture::Llama,
        Some("MistralForCausalLM") => Architecture::Mistral,
        Some("Qwen2ForCausalLM") => Architecture::Qwen2,
        Some("Qwen3ForCausalLM") => Architecture::Qwen3,
        _ => bail!(
            "architectures is {}, which is not supported; expected {EXPECTED}",
            excerpt(&Value::from(names.as_slice()))
        ),
    })
}

fn refuse_variants(fields: &Fields<'_>, architecture: Architecture) -> anyhow::Result<()> {
    if let Some(quantization) = fields.get("quantization_config") {
        let method = quantization.get("quant_method").and_then(Value::as_str).unwrap_or("unnamed");
        bail!("quantization_config is {}, which is not supported", method.escape_debug());
    }
    if let Some(activation) = fields.text("hidden_act")?
        && activation != "silu"
    {
        bail!("hidden_act is \"{}\", which is not supported; expected silu", activation.escape_debug());
    }
    // Qwen2 has its biases whatever this field says.
    if architecture != Architecture::Qwen2 && fields.boolean("attention_bias")? == Some(true) {
        bail!("attention_bias is true, which is not supported for {architecture:?}");
    }
    if fields.boolean("mlp_bias")? == Some(true) {
        bail!("mlp_bias is true, which is not supported");
    }
    match fields.number("partial_rotary_factor")? {
        Some(factor) if factor != 1.0 => {
            bail!("partial_rotary_factor is {factor}, which is not supported; expected 1")
        }
        _ => Ok(()),
    }
}

/// A window at least as long as the context hides nothing.
fn refuse_sliding_window(
    fields: &Fields<'_>,
    architecture: Architecture,
    max_position_embeddings: usize,
) -> anyhow::Result<()> {
    /// What `MistralConfig` assumes when the field is absent.
    const MISTRAL_DEFAULT: usize = 4096;
    let absent = fields.json.get("sliding_window").is_none();
    let enabled = match architecture {
        Architecture::Llama | Architecture::Mistral => true,
        Architecture::Qwen2 | Architecture::Qwen3 => fields.boolean("use_sliding_window")?.unwrap_or(false),
    };
    let window = match fields.optional_size("sliding_window")? {
        None if absent && architecture == Architecture::Mistral => Some(MISTRAL_DEFAULT),
        window => window,
    };
    match window {
        Some(window) if enabled && window < max_position_embeddings => bail!(
            "sliding_window is {window}, shorter than max_position_embeddings {max_position_embeddings}: \
             sliding-window attention is not supported"
        ),
        _ => Ok(()),
    }
}

fn head_dim(
    fields: &Fields<'_>,
    architecture: Architecture,
    hidden_size: usize,
    heads: usize,
) -> anyhow::Result<usize> {
    /// What `Qwen3Config` assumes when the field is absent.
    const QWEN3_DEFAULT: usize = 128;
    match fields.optional_size("head_dim")? {
        Some(head_dim) => Ok(head_dim),
        None if architecture == Architecture::Qwen3 => Ok(QWEN3_DEFAULT),
        None if heads > 0 && hidden_size.is_multiple_of(heads) => Ok(hidden_size / heads),
        None => bail!("hidden_size is {hidden_size}, expected a multiple of num_attention_heads {heads}"),
    }
}

/// Newer files have all of it in `rope_parameters`; older ones have `rope_theta` and `rope_scaling`.
fn rope(fields: &Fields<'_>) -> anyhow::Result<Rope> {
    let newer = fields.object("rope_parameters", "rope_parameters.")?;
    let older = fields.object("rope_scaling", "rope_scaling.")?;
    let theta = match &newer {
        Some(parameters) => parameters.number("rope_theta")?,
        None => None,
    };
    let theta = match theta {
        Some(theta) => theta,
        None => fields.number("rope_theta")?.unwrap_or(10_000.0),
    };
    let scaling = newer.or(older).map_or(Ok(RopeScaling::None), |parameters| scaling(&parameters))?;
    Ok(Rope { theta, scaling })
}

fn scaling(parameters: &Fields<'_>) -> anyhow::Result<RopeScaling> {
    let within = parameters.within;
    let kind = match parameters.text("rope_type")? {
        Some(kind) => Some(kind),
        None => parameters.text("type")?,
    };
    let required = |name: &str| -> anyhow::Result<f64> {
        parameters.number(name)?.with_context(|| format!("{within}{name} is missing"))
    };
    match kind {
        None | Some("none" | "default") => Ok(RopeScaling::None),
        Some("linear") => Ok(RopeScaling::Linear { factor: required("factor")? }),
        Some("llama3") => Ok(RopeScaling::Llama3 {
            factor: required("factor")?,
            low_freq_factor: required("low_freq_factor")?,
            high_freq_factor: required("high_freq_factor")?,
            original_max_position_embeddings: original_positions(parameters)?,
        }),
        Some(other) => bail!(
            "{within}rope_type is \"{}\", which is not supported; expected default, linear or llama3",
            other.escape_debug()
        ),
    }
}

fn original_positions(parameters: &Fields<'_>) -> anyhow::Result<u32> {
    let positions = parameters.size("original_max_position_embeddings")?;
    u32::try_from(positions).with_context(|| {
        format!(
            "{}original_max_position_embeddings is {positions}, expected less than 2^32",
            parameters.within
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A small configuration with `changes` laid over it.
    fn parsed(changes: &str) -> anyhow::Result<Config> {
        let mut json: Value = serde_json::from_str(
            r#"{"architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 96,
                "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100,
                "max_position_embeddings": 8192}"#,
        )
        .unwrap();
        let changes: Value = serde_json::from_str(changes).unwrap();
        for (name, value) in changes.as_object().unwrap() {
            json[name] = value.clone();
        }
        parse(&json.to_string())
    }

    #[test]
    fn absent_fields_take_the_librarys_defaults() {
        let config = parsed("{}").unwrap();
        assert_eq!(config.num_key_value_heads, 4);
        assert_eq!(config.head_dim, 16);
        assert_eq!(config.rms_norm_eps, 1e-6);
        assert_eq!(config.rope, Rope { theta: 10_000.0, scaling: RopeScaling::None });
        assert!(!config.tie_word_embeddings);
        assert_eq!(parsed(r#"{"architectures": ["Qwen3ForCausalLM"]}"#).unwrap().head_dim, 128);
    }

    #[test]
    fn null_counts_as_absent() {
        let config = parsed(
            r#"{"head_dim": null, "num_key_value_heads": null, "rope_scaling": null, "sliding_window": null}"#,
        );
        assert_eq!(config.unwrap(), parsed("{}").unwrap());
    }

    #[test]
    fn rope_is_read_from_old_and_new_fields() {
        let llama3 = r#"{"rope_type": "llama3", "rope_theta": 5e5, "factor": 8, "low_freq_factor": 1,
            "high_freq_factor": 4, "original_max_position_embeddings": 2048}"#;
        let new = parsed(&format!(r#"{{"rope_parameters": {llama3}}}"#)).unwrap();
        let old = parsed(&format!(r#"{{"rope_theta": 5e5, "rope_scaling": {llama3}}}"#)).unwrap();
        assert_eq!(new.rope, old.rope);
        assert_eq!(new.rope.theta, 5e5);
        assert!(matches!(new.rope.scaling, RopeScaling::Llama3 { factor: 8.0, .. }));
        let linear = parsed(r#"{"rope_scaling": {"type": "linear", "factor": 2.5}}"#).unwrap();
        assert_eq!(linear.rope.scaling, RopeScaling::Linear { factor: 2.5 });
    }

    #[test]
    fn a_sliding_window_matters_only_where_it_is_used_and_short() {
        let mistral = r#""architectures": ["MistralForCausalLM"]"#;
        let qwen = r#""architectures": ["Qwen2ForCausalLM"]"#;
        for accepted in [
            format!(r#"{{{mistral}, "sliding_window": null}}"#),
            format!(r#"{{{mistral}, "sliding_window": 8192}}"#),
            format!(r#"{{{qwen}, "sliding_window": 4096}}"#),
            format!(r#"{{{qwen}, "sliding_window": 4096, "use_sliding_window": false}}"#),
        ] {
            assert!(parsed(&accepted).is_ok(), "{accepted}");
        }
        for refused in [
            format!(r#"{{{mistral}}}"#),
            format!(r#"{{{mistral}, "sliding_window": 4096}}"#),
            format!(r#"{{{qwen}, "sliding_window": 4096, "use_sliding_window": true}}"#),
        ] {
            let error = parsed(&refused).unwrap_err().to_string();
            assert!(error.contains("sliding_window is 4096"), "{error}");
        }
    }

    #[test]
    fn what_is_not_supported_is_refused_by_name() {
        let cases = [
            (r#"{"architectures": ["GemmaForCausalLM"]}"#, "GemmaForCausalLM"),
            (r#"{"architectures": []}"#, "architectures is []"),
            (r#"{"hidden_act": "gelu"}"#, "hidden_act is \"gelu\""),
            (r#"{"attention_bias": true}"#, "attention_bias is true"),
            (r#"{"mlp_bias": true}"#, "mlp_bias is true"),
            (r#"{"quantization_config": {"quant_method": "gptq"}}"#, "quantization_config is gptq"),
            (r#"{"partial_rotary_factor": 0.5}"#, "partial_rotary_factor is 0.5"),
            (r#"{"rope_scaling": {"rope_type": "yarn", "factor": 4}}"#, "\"yarn\""),
            (r#"{"rope_scaling": {"type": "dynamic", "factor": 4}}"#, "\"dynamic\""),
            (r#"{"rope_parameters": {"rope_type": "longrope"}}"#, "\"longrope\""),
            (r#"{"rope_scaling": {"type": "linear"}}"#, "rope_scaling.factor is missing"),
            (r#"{"rope_scaling": 8}"#, "rope_scaling is 8, expected an object"),
            (r#"{"num_attention_heads": 7}"#, "hidden_size is 64, expected a multiple"),
            (r#"{"num_key_value_heads": 3}"#, "expected a multiple of num_key_value_heads 3"),
            (r#"{"hidden_size": "64"}"#, "hidden_size is \"64\", expected a non-negative integer"),
            (r#"{"num_hidden_layers": 1152921504606846976}"#, "num_hidden_layers is 1152921504606846976"),
            (r#"{"vocab_size": null}"#, "vocab_size is missing"),
        ];
        for (changes, expected) in cases {
            let error = parsed(changes).expect_err(changes).to_string();
            assert!(error.contains(expected), "{changes}: {error}");
        }
    }
}
