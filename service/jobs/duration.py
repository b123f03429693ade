"""How long a training job takes, as a rough order, on devices of known speed.

    seconds = sampling + passes

    sampling   prefill of each prompt once, then token by token: the larger of arithmetic (2 a
               weight and token) and of reading the weights once a token of the batch and the
               key-value cache once a row, plus the time to launch a block's kernels
    passes     4 operations a weight and token for adapters over a frozen base (forward 2, gradient
               of the activations 2), 6 for full weights, 2 more with gradient checkpointing.
               J_SFT has one pass over the demonstrations, J_RL one over the rollouts; BRIDGE's
               shadow has another over the rollouts, and `order: sequential` makes all of them
               twice. The KL term and the importance correction are a forward pass each. The head
               counts where a completion token is predicted; attention counts 2 · length · queries
               a token and block (half a square: it is causal), three times that with its gradient

Texts are taken to be of the mean length (page `lengths`), completions half of `max_new_tokens`, the
longest of a batch all of it. Not counted: evaluations (as dear as
sampling one answer for each held-out problem), verification, loading and saving, padding, rollouts
that are skipped because their whole group is alike, further rounds of dynamic sampling.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from bridge_engine.models.shapes import Shape
from bridge_engine.spec.train import TrainSpec
from service.jobs.lengths import lengths
from service.jobs.memory import compute_width, rollouts_per_step


@dataclass(frozen=True)
class Device:
    """What a device can do, and how much of it a training job usually gets."""

    flops_16: float
    """Operations a second in bfloat16, by its data sheet (CPU: a measured matrix product)."""
    flops_32: float
    """The same in float32."""
    bandwidth: float
    """Bytes a second from its memory."""
    efficiency: float
    """Share of either that is reached."""
    launch: float
    """Seconds that one block of the model costs in a pass however little it computes."""


DEVICES: Mapping[str, Device] = {
    "h200": Device(989e12, 67e12, 4.8e12, 0.4, 6e-4),
    "a100": Device(312e12, 19.5e12, 2.0e12, 0.4, 6e-4),
    "cpu_core": Device(393e9, 102e9, 10e9, 0.3, 4e-4),
}
"""By the names that `Estimates.seconds` has them under; one of each."""


@dataclass(frozen=True)
class Work:
    """What a whole run computes."""

    sampling_flops: float
    sampling_bytes: float
    sampling_blocks: float
    """Blocks launched in sampling."""
    pass_flops: float
    pass_blocks: float

    @property
    def flops(self) -> float:
        """Arithmetic of the whole run."""
        return self.sampling_flops + self.pass_flops

    def seconds(self, device: Device, *, width: int, launches: bool) -> float:
        """On this device; `width` is the bytes of a scalar, `launches` False where the sampler
        launches its kernels as one graph (vLLM)."""
        rate = (device.flops_16 if width == 2 else device.flops_32) * device.efficiency
        reading = self.sampling_bytes / (device.bandwidth * device.efficiency)
        sampling = max(self.sampling_flops / rate, reading)
        if launches:
            sampling += self.sampling_blocks * device.launch
        return sampling + self.pass_flops / rate + self.pass_blocks * device.launch


@dataclass(frozen=True)
class Sampled:
    """Completions that are sampled, and from what."""

    prompts: float
    """How many different ones."""
    prompt: float
    """Tokens of each."""
    rows: float
    """Completions."""
    written: float
    """Tokens of each."""
    batches: float
    longest: int
    """Tokens of the longest completion of a batch."""

    def flops(self, shape: Shape) -> float:
        """Arithmetic: prefill, then every token through weights, head and attention."""
        weights, head = shape.linear_parameters(), shape.head_parameters
        decoded = self.rows * self.written
        attention = 2 * shape.layers * shape.queries
        return 2 * (decoded * (weights + head) + self.prompts * self.prompt * weights) + (
            2 * attention * decoded * (self.prompt + self.written / 2)
        )

    def bytes(self, shape: Shape, width: int) -> float:
        """Read from memory: the weights once a token of a batch, the cache once a row."""
        weights, head = shape.linear_parameters(), shape.head_parameters
        cached = 2 * shape.layers * shape.keys * width * (self.prompt + self.written / 2)
        return (
            self.batches * self.longest * (weights + head) * width
            + self.rows * self.written * cached
        )

    def blocks(self, shape: Shape) -> float:
        """Blocks of the model that are launched."""
        return self.batches * self.longest * shape.layers


def work(spec: TrainSpec, shape: Shape, context: int) -> Work:
    """The arithmetic of a run; the formulas are on top of this page."""
    demo_steps, reward_steps = spec.method.totals(spec.steps)
    texts = lengths(spec, context)
    prompt, written = texts.prompt, texts.completion
    rollouts = reward_steps * rollouts_per_step(spec)
    demos = demo_steps * spec.sft.batch_size
    if spec.method.paired:  # at most: a demonstration for every problem
        demos = reward_steps * spec.rollout.prompts_per_step

    width = compute_width(spec)
    weights, head = shape.linear_parameters(), shape.head_parameters
    batch = min(spec.rollout.batch_size, max(1, rollouts_per_step(spec)))
    attention = 2 * shape.layers * shape.queries
    sampled = Sampled(
        prompts=reward_steps * spec.rollout.prompts_per_step,
        prompt=prompt,
        rows=rollouts,
        written=written,
        batches=-(-rollouts_per_step(spec) // batch) * reward_steps,
        longest=spec.rollout.max_new_tokens,
    )

    times = 2 if getattr(spec.method, "order", "simultaneous") == "sequential" else 1
    thetas = 2 if "shadow" in spec.method.adapters else 1
    explored = rollouts * times * thetas * spec.rl.inner_epochs
    forwards = explored * bool(spec.rl.kl_coef)
    forwards += rollouts * (spec.rl.importance_correction == "truncated")
    again = int(spec.runtime.gradient_checkpointing)
    training = (6 if spec.student.form == "full" else 4) + 2 * again

    def flops(count: float, length: float, completion: float, each: int, attends: int) -> float:
        """Of `count` sequences: `each` operations a weight and token, `attends` passes through
        attention, which has no weights."""
        weighing = each * (length * weights + completion * head)
        return count * (weighing + attends * attention * length * length)

    length = prompt + written
    micro = spec.runtime.micro_batch
    return Work(
        sampling_flops=sampled.flops(shape),
        sampling_bytes=sampled.bytes(shape, width),
        sampling_blocks=sampled.blocks(shape),
        pass_flops=flops(explored, length, written, training, 3 + again)
        + flops(demos * times, texts.demo, texts.demo_solution, training, 3 + again)
        + flops(forwards, length, written, 2, 1),
        pass_blocks=3 * shape.layers * (explored + demos * times + forwards / 3) / micro,
    )
