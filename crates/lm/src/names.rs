//! Where each parameter of the transformer stands in a Hugging Face folder.
//!
//! The transformer keeps matrices as `[inputs, outputs]`; most families store them the other way
//! round, GPT-2 fuses query, key and value by columns, and GPT-NeoX fuses them head by head.

use crate::config::{Family, MlpKind, ModelConfig, NormKind};

/// A parameter of the transformer.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Parameter {
    /// Path in the module tree, such as `blocks.0.query.weight`.
    pub(crate) path: String,
    /// Shape in the module.
    pub(crate) shape: Vec<usize>,
    /// Where it stands on disk.
    pub(crate) source: Source,
}

/// How a parameter is stored.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Source {
    /// As it is.
    Plain(String),
    /// As `[outputs, inputs]`.
    Transposed(String),
    /// Part 0, 1 or 2 of three blocks of columns: `[inputs, 3 * outputs]`, or `[3 * outputs]`.
    Columns(String, usize),
    /// Part 0, 1 or 2 inside each head: `[heads * 3 * head_dim, inputs]`, or without `inputs`.
    Heads(String, usize),
}

impl Source {
    pub(crate) fn name(&self) -> &str {
        match self {
            Self::Plain(name)
            | Self::Transposed(name)
            | Self::Columns(name, _)
            | Self::Heads(name, _) => name,
        }
    }

    /// The shape on disk of what is `shape` in the module.
    pub(crate) fn stored_shape(&self, shape: &[usize]) -> Vec<usize> {
        match (self, shape) {
            (Self::Transposed(_), &[inputs, outputs]) => vec![outputs, inputs],
            (Self::Columns(..), &[inputs, outputs]) => vec![inputs, 3 * outputs],
            (Self::Heads(..), &[inputs, outputs]) => vec![3 * outputs, inputs],
            (Self::Columns(..) | Self::Heads(..), &[outputs]) => vec![3 * outputs],
            _ => shape.to_vec(),
        }
    }

    /// Calls `pair(index in the module, index on disk)` for every element of the parameter.
    pub(crate) fn for_each_element(
        &self,
        shape: &[usize],
        head_dim: usize,
        mut pair: impl FnMut(usize, usize),
    ) {
        let (inputs, outputs) = match *shape {
            [inputs, outputs] => (inputs, outputs),
            [outputs] => (1, outputs),
            _ => unreachable!("parameters have one or two dimensions"),
        };
        for input in 0..inputs {
            for output in 0..outputs {
                let stored = match self {
                    Self::Plain(_) => input * outputs + output,
                    Self::Transposed(_) => output * inputs + input,
                    Self::Columns(_, part) => input * 3 * outputs + part * outputs + output,
                    Self::Heads(_, part) => {
                        let (head, within) = (output / head_dim, output % head_dim);
                        ((head * 3 + part) * head_dim + within) * inputs + input
                    }
                };
                pair(input * outputs + output, stored);
            }
        }
    }
}

/// Tensors that older exports carry and that hold nothing learnt.
pub(crate) fn is_buffer(name: &str) -> bool {
    [
        ".attn.bias",
        ".attn.masked_bias",
        ".attention.bias",
        ".attention.masked_bias",
        ".rotary_emb.inv_freq",
    ]
    .iter()
    .any(|suffix| name.ends_with(suffix))
}

/// Every parameter of the model, in the order of the module tree.
pub(crate) fn parameters(config: &ModelConfig) -> Vec<Parameter> {
    let mut list = Vec::new();
    let names = Names::of(config.family);
    let hidden = config.hidden_size;
    let query = config.n_heads * config.head_dim;
    let key = config.n_kv_heads * config.head_dim;
    let mut add = |path: String, shape: Vec<usize>, source: Source| {
        list.push(Parameter {
            path,
            shape,
            source,
        });
    };
    let norm = |path: &str, name: &str, add: &mut dyn FnMut(String, Vec<usize>, Source)| {
        add(
            format!("{path}.weight"),
            vec![hidden],
            Source::Plain(format!("{name}.weight")),
        );
        if config.norm == NormKind::Layer {
            add(
                format!("{path}.bias"),
                vec![hidden],
                Source::Plain(format!("{name}.bias")),
            );
        }
    };
    add(
        "embed".into(),
        vec![config.vocab_size, hidden],
        Source::Plain(names.embed.into()),
    );
    if config.rope.is_none() {
        add(
            "positions".into(),
            vec![config.max_positions, hidden],
            Source::Plain("transformer.wpe.weight".into()),
        );
    }
    for layer in 0..config.n_layers {
        let path = format!("blocks.{layer}");
        let name = format!("{}.{layer}", names.blocks);
        norm(
            &format!("{path}.attn_norm"),
            &format!("{name}.{}", names.attn_norm),
            &mut add,
        );
        for (part, (role, outputs)) in [("query", query), ("key", key), ("value", key)]
            .into_iter()
            .enumerate()
        {
            let source = |leaf: &str| match config.family {
                Family::Gpt2 => Source::Columns(format!("{name}.attn.c_attn.{leaf}"), part),
                Family::GptNeox => {
                    Source::Heads(format!("{name}.attention.query_key_value.{leaf}"), part)
                }
                _ => {
                    let full = format!("{name}.self_attn.{}_proj.{leaf}", &role[..1]);
                    match leaf {
                        "weight" => Source::Transposed(full),
                        _ => Source::Plain(full),
                    }
                }
            };
            add(
                format!("{path}.{role}.weight"),
                vec![hidden, outputs],
                source("weight"),
            );
            if config.qkv_bias {
                add(format!("{path}.{role}.bias"), vec![outputs], source("bias"));
            }
        }
        let matrix = |name: String| match config.family {
            Family::Gpt2 => Source::Plain(name),
            _ => Source::Transposed(name),
        };
        let mut linear = |role: &str, leaf: &str, shape: [usize; 2], bias: bool| {
            add(
                format!("{path}.{role}.weight"),
                shape.to_vec(),
                matrix(format!("{name}.{leaf}.weight")),
            );
            if bias {
                add(
                    format!("{path}.{role}.bias"),
                    vec![shape[1]],
                    Source::Plain(format!("{name}.{leaf}.bias")),
                );
            }
        };
        linear("output", names.output, [query, hidden], config.out_bias);
        if config.qk_norm {
            for role in ["query", "key"] {
                add(
                    format!("{path}.{role}_norm"),
                    vec![config.head_dim],
                    Source::Plain(format!("{name}.self_attn.{}_norm.weight", &role[..1])),
                );
            }
        }
        norm(
            &format!("{path}.mlp_norm"),
            &format!("{name}.{}", names.mlp_norm),
            &mut add,
        );
        let inner = config.intermediate_size;
        let mut linear = |role: &str, leaf: &str, shape: [usize; 2]| {
            add(
                format!("{path}.{role}.weight"),
                shape.to_vec(),
                matrix(format!("{name}.{leaf}.weight")),
            );
            if config.mlp_bias {
                add(
                    format!("{path}.{role}.bias"),
                    vec![shape[1]],
                    Source::Plain(format!("{name}.{leaf}.bias")),
                );
            }
        };
        if config.mlp == MlpKind::SwiGlu {
            linear("gate", "mlp.gate_proj", [hidden, inner]);
        }
        linear("up", names.up, [hidden, inner]);
        linear("down", names.down, [inner, hidden]);
    }
    norm("norm", names.norm, &mut add);
    if !config.tied {
        add(
            "head.weight".into(),
            vec![hidden, config.vocab_size],
            Source::Transposed(names.head.into()),
        );
    }
    list
}

/// What a linear layer of a block does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// Query, key and value, where they are stored as one matrix.
    Fused,
    Query,
    Key,
    Value,
    Output,
    Gate,
    Up,
    Down,
}

impl Role {
    const ALL: [(Self, &'static str); 8] = [
        (Self::Fused, "fused"),
        (Self::Query, "query"),
        (Self::Key, "key"),
        (Self::Value, "value"),
        (Self::Output, "output"),
        (Self::Gate, "gate"),
        (Self::Up, "up"),
        (Self::Down, "down"),
    ];
}

/// A linear layer of a block, as transformers has it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct LinearLayer {
    /// Such as `model.layers.0.self_attn.q_proj`.
    pub(crate) name: String,
    pub(crate) block: usize,
    pub(crate) role: Role,
    pub(crate) inputs: usize,
    pub(crate) outputs: usize,
}

impl LinearLayer {
    /// The last part of the name.
    pub(crate) fn leaf(&self) -> &str {
        self.name.rsplit('.').next().unwrap_or_default()
    }

    /// Where the layer's adapter stands in the module tree.
    pub(crate) fn adapter_path(&self) -> String {
        let role = Role::ALL.iter().find(|(role, _)| *role == self.role);
        let role = role.map_or("", |(_, path)| path);
        match self.role {
            Role::Fused => format!("blocks.{}.{role}", self.block),
            _ => format!("blocks.{}.{role}.adapter", self.block),
        }
    }
}

/// The linear layers of all blocks, in the order of the module tree.
pub(crate) fn linear_layers(config: &ModelConfig) -> Vec<LinearLayer> {
    let mut layers: Vec<LinearLayer> = Vec::new();
    for parameter in parameters(config) {
        let path: Vec<&str> = parameter.path.split('.').collect();
        let (["blocks", block, role, "weight"], &[inputs, outputs]) =
            (&path[..], &parameter.shape[..])
        else {
            continue;
        };
        let Some(name) = parameter.source.name().strip_suffix(".weight") else {
            continue;
        };
        if let Some(last) = layers.last_mut()
            && last.name == name
        {
            last.role = Role::Fused;
            last.outputs += outputs;
            continue;
        }
        let role = Role::ALL.iter().find(|(_, path)| path == role);
        if let (Some((role, _)), Ok(block)) = (role, block.parse()) {
            layers.push(LinearLayer {
                name: name.to_string(),
                block,
                role: *role,
                inputs,
                outputs,
            });
        }
    }
    layers
}

/// The name under which a tied model may store its one table instead of the embedding's.
pub(crate) fn head_name(family: Family) -> &'static str {
    Names::of(family).head
}

struct Names {
    embed: &'static str,
    blocks: &'static str,
    attn_norm: &'static str,
    output: &'static str,
    mlp_norm: &'static str,
    up: &'static str,
    down: &'static str,
    norm: &'static str,
    head: &'static str,
}

impl Names {
    fn of(family: Family) -> Self {
        match family {
            Family::Gpt2 => Self {
                embed: "transformer.wte.weight",
                blocks: "transformer.h",
                attn_norm: "ln_1",
                output: "attn.c_proj",
                mlp_norm: "ln_2",
                up: "mlp.c_fc",
                down: "mlp.c_proj",
                norm: "transformer.ln_f",
                head: "lm_head.weight",
            },
            Family::GptNeox => Self {
                embed: "gpt_neox.embed_in.weight",
                blocks: "gpt_neox.layers",
                attn_norm: "input_layernorm",
                output: "attention.dense",
                mlp_norm: "post_attention_layernorm",
                up: "mlp.dense_h_to_4h",
                down: "mlp.dense_4h_to_h",
                norm: "gpt_neox.final_layer_norm",
                head: "embed_out.weight",
            },
            _ => Self {
                embed: "model.embed_tokens.weight",
                blocks: "model.layers",
                attn_norm: "input_layernorm",
                output: "self_attn.o_proj",
                mlp_norm: "post_attention_layernorm",
                up: "mlp.up_proj",
                down: "mlp.down_proj",
                norm: "model.norm",
                head: "lm_head.weight",
            },
        }
    }
}
