"""Every number of the recipe, in one place. The defaults are those of the run that made the bundled model."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class ExpertLayout:
    """How a dense FFN becomes a mixture of experts."""

    n_expert: int = 32
    n_used: int = 8
    """experts per token"""
    width: int = 64
    """neurons per expert: its own share of the dense FFN's neurons, the rest are copies of the strongest ones"""


@dataclass(frozen=True)
class ChatTokens:
    """Token ids of the base's ChatML vocabulary that drive a conversation."""

    end_of_text: int = 0
    im_start: int = 1
    im_end: int = 2
    open_user: tuple[int, ...] = (198, 1, 4093, 198)
    """newline, <|im_start|>, "user", newline"""
    open_assistant: tuple[int, ...] = (198, 1, 520, 9531, 198)
    """newline, <|im_start|>, "assistant" (two tokens), newline"""


WEIGHT_BITS: dict[str, int] = {
    "token_embd": 5,
    "attn_q": 4,
    "attn_k": 5,
    "attn_v": 5,
    "attn_output": 4,
    "ffn_gate_exps": 4,
    "ffn_up_exps": 4,
    "ffn_down_exps": 4,
}
"""Bits per weight, by GGUF tensor name: 4 is Q4_0, 5 is Q5_0, a name that is absent stays F32.

The training loop rounds the weights as the exported file will hold them, so both read this table.
"""


@dataclass(frozen=True)
class PromptConfig:
    """What starts the rows that the dense model writes."""

    seed: int = 7
    prefix_length: int = 128
    """longest forced prefix, in tokens"""
    default_system_share: float = 0.75
    """share of chats that begin with the base's own system message"""

    # Kinds of rows; what is left of 1 is plain text from nothing at all.
    open_chat_share: float = 0.48
    """the model writes the user's turn, too"""
    asked_chat_share: float = 0.32
    """the user's first question is given"""
    opened_text_share: float = 0.06
    """plain text after an opening line"""
    continued_text_share: float = 0.07
    """plain text after a piece of a real document"""

    small_talk_share: float = 0.22
    """share of given questions that come from the list of small talk"""
    document_start_share: float = 0.30
    """share of real pieces that are a document's beginning"""
    chat_temperature: tuple[float, float] = (0.75, 1.0)
    text_temperature: tuple[float, float] = (0.85, 1.0)


@dataclass(frozen=True)
class GenerateConfig:
    """How the dense model writes."""

    rows: int = 3072
    """rows sampled in lockstep"""
    length: int = 512
    """tokens per row: the base repeats itself in longer ones"""
    rounds: int = 12
    min_p: float = 0.015
    """a token less likely than this share of the likeliest is never drawn"""
    min_distinct: float = 0.5
    """rows with a smaller share of distinct trigrams are stuck in a loop and dropped"""


@dataclass(frozen=True)
class UpcycleConfig:
    """Neurons to experts, without gradient descent."""

    calibration_rows: int = 80
    generated_share: tuple[int, int] = (2, 3)
    """numerator and denominator of the calibration rows that the dense model wrote; the rest is real text"""
    cluster_tokens: int = 6000
    cluster_rounds: int = 12
    cluster_temperature: float = 0.03
    sinkhorn_rounds: int = 30
    copies_per_neuron: int = 4
    """experts that get a copy of each of the strongest neurons"""
    energy_clip_quantile: float = 0.999
    router_ridge: float = 1e-3
    router_logit_std: float = 0.6
    down_ridge: float = 0.01


@dataclass(frozen=True)
class LayerwiseConfig:
    """Each layer's experts learn their dense FFN's output."""

    seconds: float = 40.0
    learning_rate: float = 2e-3
    final_rate: float = 0.15
    """learning rate at the end of the cosine, relative to its peak"""
    warmup_steps: int = 30
    first_token_weight: float = 0.03
    """extra weight of each row's first token, whose activations are unlike all others"""


@dataclass(frozen=True)
class DistilConfig:
    """The whole model learns the dense model's next-token distribution."""

    seconds: float = 600.0
    expert_rate: float = 1.2e-3
    """learning rate of experts and routers"""
    dense_rate: float = 5e-4
    """learning rate of attention and embedding"""
    norm_rate: float = 2e-4
    """learning rate of norm gains"""
    final_rate: float = 0.01
    warmup_steps: int = 100
    cross_entropy_weight: float = 0.05
    gradient_clip: float = 1.0
    head_chunk: int = 8192
    """tokens whose logits exist at one time"""


@dataclass(frozen=True)
class TrainConfig:
    """One training run."""

    rows: int = 32
    length: int = 1024
    """tokens per row"""
    real_share: float = 0.3
    """share of rows that are real text"""
    held_out_rows: int = 128
    """generated rows kept for the figures"""
    figure_windows: int = 64
    """windows of real held-out text that the figures use, at most"""
    seed: int = 1
    data_seed: int = 2
    compiled: bool = True
    balance_weight: float = 0.01
    """load balance loss, per layer"""
    z_weight: float = 1e-4
    """router z-loss, per layer"""
    error_floor: float = 0.09
    """floor of a layer's relative error, as a share of the median squared norm of its outputs"""
    adam_betas: tuple[float, float] = (0.9, 0.95)
    experts: ExpertLayout = field(default_factory=ExpertLayout)
    upcycle: UpcycleConfig = field(default_factory=UpcycleConfig)
    layerwise: LayerwiseConfig = field(default_factory=LayerwiseConfig)
    distil: DistilConfig = field(default_factory=DistilConfig)

    @classmethod
    def smoke(cls) -> TrainConfig:
        """Every stage at the smallest size that still exercises it: minutes on a CPU."""
        return cls(
            rows=2,
            length=512,
            held_out_rows=2,
            figure_windows=1,
            compiled=False,
            upcycle=UpcycleConfig(calibration_rows=6),
            layerwise=LayerwiseConfig(seconds=3.0),
            distil=DistilConfig(seconds=4.0),
        )
