"""Small real models: random weights, a real tokenizer, saved as `save_pretrained` writes them.

Heavy imports stay inside the functions, since most tests need no torch.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

# What a shell starts in the background ignores Ctrl-C, and so do all processes that it starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# As `pipeline` does: tests hold channels open when they start Ray.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "false")

# No test is timed: a busy machine must not fail one.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|{{ message['role'] }}|>{{ message['content'] }}<|end|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

MakeModel = Callable[..., Path]
MakeTokenizer = Callable[..., Any]


def build_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> Any:
    """A byte-level BPE tokenizer of about 300 tokens; it can spell any text."""
    import tokenizers
    import transformers

    specials = ["<|bos|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.train_from_iterator(
        ["the ship steers to the north", "the crew answers the captain", "yes and no"],
        tokenizers.trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=specials,
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|bos|>", eos_token="<|end|>", pad_token="<|bos|>"
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def build_config(family: str, **changes: Any) -> Any:
    """The configuration of a tiny model of a family."""
    import transformers

    sizes = {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 256,
        "bos_token_id": 0,
        "eos_token_id": 4,
        "pad_token_id": 0,
        # Large enough that attention tells tokens apart, as in a trained model.
        "initializer_range": 0.2,
    }
    wide = {"head_dim": 16}
    match family:
        case "llama":
            config = transformers.LlamaConfig(**sizes | changes)
        case "llama-wide-heads":
            config = transformers.LlamaConfig(**sizes | wide | changes)
        case "mistral-window":
            config = transformers.MistralConfig(**sizes | {"sliding_window": 5} | changes)
        case "qwen2":
            config = transformers.Qwen2Config(**sizes | changes)
        case "qwen3":
            config = transformers.Qwen3Config(**sizes | wide | changes)
        case "gemma2":
            config = transformers.Gemma2Config(**sizes | wide | {"sliding_window": 5} | changes)
        case "gemma3-bidirectional":
            gemma = wide | {"use_bidirectional_attention": True}
            config = transformers.Gemma3TextConfig(**sizes | gemma | changes)
        case "phi3-longrope":
            # Heads of 8 entries are turned by 4 factors, others from 60 tokens on.
            rope = {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
            original = {"original_max_position_embeddings": 60, "rope_scaling": rope}
            config = transformers.Phi3Config(**sizes | original | changes)
        case "phi3":
            config = transformers.Phi3Config(**sizes | changes)
        case "mixtral":
            experts = {"num_local_experts": 3, "num_experts_per_tok": 2}
            config = transformers.MixtralConfig(**sizes | experts | changes)
        case "gpt-neox":
            sizes.pop("num_key_value_heads")
            config = transformers.GPTNeoXConfig(**sizes | changes)
        case "gpt2":
            config = transformers.GPT2Config(
                vocab_size=320,
                n_embd=64,
                n_layer=3,
                n_head=8,
                n_positions=256,
                bos_token_id=0,
                eos_token_id=4,
                initializer_range=0.2,
                **changes,
            )
        case "llama-mha":
            config = transformers.LlamaConfig(**sizes | {"num_key_value_heads": 8} | changes)
        case "qwen3-moe":
            experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
            # Block 1 has a plain MLP, as Qwen3-MoE's mlp_only_layers allow.
            mixed = wide | experts | {"mlp_only_layers": [1]}
            config = transformers.Qwen3MoeConfig(**sizes | mixed | changes)
        case "gemma":
            config = transformers.GemmaConfig(**sizes | wide | changes)
        case "gemma3":
            gemma = wide | {"sliding_window": 5, "layer_types": _one_full_layer()}
            config = transformers.Gemma3TextConfig(**sizes | gemma | changes)
        case "gpt-neox-sequential":
            sizes.pop("num_key_value_heads")
            config = transformers.GPTNeoXConfig(
                **sizes | {"use_parallel_residual": False} | changes
            )
        case "olmo2":
            config = transformers.Olmo2Config(**sizes | changes)
        case "falcon":
            # Falcon 40B and later: grouped heads, a norm each for attention and MLP.
            falcon = {"new_decoder_architecture": True, "num_kv_heads": 4, "ffn_hidden_size": 96}
            config = transformers.FalconConfig(**sizes | falcon | changes)
        case "falcon-7b":
            falcon = {"multi_query": True, "parallel_attn": True, "ffn_hidden_size": 96}
            config = transformers.FalconConfig(**sizes | falcon | changes)
        case "falcon-rw":
            # Sequential, with ALiBi and biases.
            falcon = {"multi_query": False, "parallel_attn": False, "alibi": True, "bias": True}
            config = transformers.FalconConfig(**sizes | falcon | changes)
        case "granite":
            scales = {"residual_multiplier": 0.22, "attention_multiplier": 0.125}
            config = transformers.GraniteConfig(**sizes | scales | changes)
        case "cohere":
            config = transformers.CohereConfig(**sizes | {"use_qk_norm": True} | changes)
        case "cohere2":
            cohere = wide | {"sliding_window": 5, "layer_types": _one_full_layer()}
            config = transformers.Cohere2Config(**sizes | cohere | changes)
        case "phi":
            config = transformers.PhiConfig(**sizes | changes)
        case "stablelm":
            config = transformers.StableLmConfig(**sizes | changes)
        case "stablelm-parallel":
            config = transformers.StableLmConfig(
                **sizes | {"use_parallel_residual": True} | changes
            )
        case _:
            raise ValueError(family)
    return config


def _one_full_layer() -> list[str]:
    """Two layers with a sliding window around one without."""
    return ["sliding_attention", "full_attention", "sliding_attention"]


def save_model(
    folder: Path,
    family: str = "llama",
    *,
    dtype: str = "float32",
    seed: int = 0,
    edit: Callable[[Any], None] = lambda model: None,
    chat_template: str | None = CHAT_TEMPLATE,
    **changes: Any,
) -> Path:
    """Save a random model with its tokenizer.

    Args:
        edit: Changes the weights before they are saved.
        changes: Fields of the configuration.
    """
    import torch
    import transformers

    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(build_config(family, **changes))
    with torch.no_grad():
        edit(model)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    build_tokenizer(chat_template).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> MakeModel:
    """`save_model` into a folder of its own; a model is built once a session."""
    made: dict[str, Path] = {}

    def make(family: str = "llama", **options: Any) -> Path:
        key = f"{family} {sorted(options.items())}"
        if key not in made:
            folder = tmp_path_factory.mktemp("model") / family
            made[key] = save_model(folder, family, **options)
        return made[key]

    return make


@pytest.fixture(scope="session")
def make_tokenizer() -> MakeTokenizer:
    """See `build_tokenizer`."""
    return build_tokenizer


@pytest.fixture(scope="session")
def ray_running() -> Iterator[None]:
    """One local Ray for every test that computes in this process."""
    from pipeline.ray_runtime import ray_session

    with ray_session(None, 2):
        yield
