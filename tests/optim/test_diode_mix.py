"""DiodeMix: AdamW for float parameters, steps in the codes for packed ones, and torch's training tools around it."""

import copy
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import lr_scheduler

from bitorch_engine import nBitConv2d, nBitConvParameter, nBitConvTranspose2d
from bitorch_engine.optim import DiodeMix, GaLoreProjector
from bitorch_engine.parameters import PackedParameter

MEMORIES = ["fp32", "bf16", "fp16", "8bit", "channel"]
PROJ_TYPES = ["std", "reverse_std", "right", "left", "full"]
GALORE = {"rank": 2, "update_proj_gap": 3, "scale": 0.5, "proj_type": "std"}


class Task(nn.Module):
    """Two packed convolutions, a plain and a transposed one, and a float layer, that have to learn a regression."""

    def __init__(self, seed: int = 0, w_bit: int = 4, **settings: Any) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv = nBitConv2d(3, 8, 3, w_bit=w_bit, **settings)
        self.up = nBitConvTranspose2d(8, 4, 2, groups=2, w_bit=w_bit, **settings)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.up(F.relu(self.conv(x))).mean((2, 3)))

    @property
    def packed(self) -> list[PackedParameter]:
        return [p for p in self.parameters() if isinstance(p, PackedParameter)]

    def loss(self, step: int = 0) -> Tensor:
        """The mean squared error on the batch of that number: another one for each of 4 steps."""
        generator = torch.Generator().manual_seed(step % 4)
        x = torch.randn(8, 3, 6, 6, generator=generator)
        return F.mse_loss(self(x), torch.stack([x[:, i % 3].mean((1, 2)) + 0.2 * i for i in range(5)], 1))


def train(task: Task, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        task.loss(step).backward()
        optimizer.step()


def bits_of(value: Any) -> Any:
    """All that ``value`` holds, in a form in which == compares every bit and every type."""
    if isinstance(value, PackedParameter):
        return bits_of([value.packed, value.channel_scale, value.training_state(), value.w_bit])
    if isinstance(value, Tensor):
        flat = value.detach().contiguous().view(-1)
        return value.dtype, tuple(value.shape), flat.view(torch.uint8).numpy().tobytes()
    if hasattr(value, "state_dict"):
        return bits_of(value.state_dict())
    if isinstance(value, dict):
        return [(key, bits_of(item)) for key, item in value.items()]
    if isinstance(value, (list, tuple)):
        return [bits_of(item) for item in value]
    return type(value), repr(value)


def tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ():
        yield from tensors_in(item)


def level_size(weight: PackedParameter) -> float:
    """The most that one of the 256 levels is worth."""
    return float(weight.channel_scale.max()) * weight.format.step / 2**weight.format.hidden_bits


class TestFloatParameters:
    """They are stepped as torch.optim.AdamW steps them."""

    SHAPES = ((), (5,), (7, 3), (4, 3, 3, 3))

    def pairs(self, dtype: torch.dtype) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        values = [torch.randn(shape, dtype=dtype) for shape in self.SHAPES]
        return [nn.Parameter(v.clone()) for v in values], [nn.Parameter(v.clone()) for v in values]

    def assert_equal_steps(
        self,
        ours: tuple[list[nn.Parameter], torch.optim.Optimizer],
        theirs: tuple[list[nn.Parameter], torch.optim.Optimizer],
        after_step: Callable[[int], Any] = lambda step: None,
    ) -> None:
        for step in range(20):
            for a, b in zip(ours[0], theirs[0], strict=True):
                a.grad = torch.randn_like(a) * 10.0 ** (step % 5 - 3)
                b.grad = a.grad.clone()
            ours[1].step()
            theirs[1].step()
            for a, b in zip(ours[0], theirs[0], strict=True):
                torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
            after_step(step)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    @pytest.mark.parametrize("weight_decay", [0.0, 0.1])
    @pytest.mark.parametrize("eps", [1e-8, 1e-6, 1e-3])
    def test_twenty_steps_are_adamws(self, eps: float, weight_decay: float, dtype: torch.dtype) -> None:
        ours, theirs = self.pairs(dtype)
        settings: dict[str, Any] = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": eps, "weight_decay": weight_decay}
        optimizers = DiodeMix(ours, **settings), torch.optim.AdamW(theirs, **settings)
        self.assert_equal_steps((ours, optimizers[0]), (theirs, optimizers[1]))

    def test_many_of_any_kind_step_as_each_alone_does(self) -> None:
        """float32 parameters of a group go together, through torch's fused AdamW; others do not, and nobody sees it."""

        def parameters() -> list[nn.Parameter]:
            torch.manual_seed(3)
            dense = [nn.Parameter(torch.randn(shape)) for shape in self.SHAPES]
            strided = nn.Parameter(torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last))
            return [*dense, strided, nn.Parameter(torch.randn(5).double()), PackedParameter(torch.randn(8, 9))]

        together, alone, in_backward = parameters(), parameters(), parameters()
        optimizers = [DiodeMix([{"params": together[:3]}, {"params": together[3:], "lr": 0.1}])]
        optimizers += [DiodeMix([p], lr=1e-3 if i < 3 else 0.1) for i, p in enumerate(alone)]
        hooked = DiodeMix([{"params": in_backward[:3]}, {"params": in_backward[3:], "lr": 0.1}])
        hooked.step_in_backward()
        for _ in range(3):
            factors = [torch.randn(p.shape, dtype=p.dtype) for p in together]
            for own in (together, alone):
                for p, factor in zip(own, factors, strict=True):
                    p.grad = factor.clone()
            for optimizer in optimizers:
                optimizer.step()
            torch.stack([(p * f).sum().double() for p, f in zip(in_backward, factors, strict=True)]).sum().backward()
        for a, b, c in zip(together, alone, in_backward, strict=True):
            assert torch.equal(a, b)
            assert torch.equal(a, c)

    def test_a_state_of_another_memory_goes_on(self) -> None:
        p = nn.Parameter(torch.randn(64, 64))
        optimizer = DiodeMix([p], memory="channel")
        for memory in ("channel", "8bit"):
            optimizer.param_groups[0]["memory"] = memory
            p.grad = torch.randn(64, 64)
            optimizer.step()
        assert optimizer.state[p]["exp_avg_s"].shape == (64, 1)
        assert int(optimizer.state[p]["step"]) == 2

    @pytest.mark.parametrize("memory", MEMORIES)
    def test_memory_is_about_packed_weights_and_large_matrices_only(self, memory: str) -> None:
        ours, theirs = self.pairs(torch.float32)
        optimizers = DiodeMix(ours, memory=memory), torch.optim.AdamW(theirs, eps=1e-6, weight_decay=0.0)
        self.assert_equal_steps((ours, optimizers[0]), (theirs, optimizers[1]))

    def test_groups_have_their_own_settings(self) -> None:
        ours, theirs = self.pairs(torch.float32)

        def groups(p: list[nn.Parameter]) -> list[dict[str, Any]]:
            return [{"params": p[:2], "lr": 0.1, "betas": (0.5, 0.6)}, {"params": p[2:], "weight_decay": 0.3}]

        optimizers = (
            DiodeMix(groups(ours), lr=1e-3, eps=1e-8),
            torch.optim.AdamW(groups(theirs), lr=1e-3, eps=1e-8, weight_decay=0.0),
        )
        self.assert_equal_steps((ours, optimizers[0]), (theirs, optimizers[1]))

    @pytest.mark.parametrize(
        "schedule",
        [
            lambda o: lr_scheduler.CosineAnnealingLR(o, 20),
            lambda o: lr_scheduler.OneCycleLR(o, 1e-2, 25),  # cycles betas, too
            lambda o: lr_scheduler.LambdaLR(o, lambda step: step % 3),
            lambda o: lr_scheduler.SequentialLR(
                o, [lr_scheduler.LinearLR(o, total_iters=5), lr_scheduler.ExponentialLR(o, 0.8)], [6]
            ),
        ],
        ids=["CosineAnnealingLR", "OneCycleLR", "LambdaLR", "SequentialLR"],
    )
    def test_a_schedule_acts_as_on_adamw(self, schedule: Callable[[torch.optim.Optimizer], Any]) -> None:
        ours, theirs = self.pairs(torch.float32)
        optimizers = DiodeMix(ours, eps=1e-8), torch.optim.AdamW(theirs, weight_decay=0.0)
        schedulers = [schedule(optimizer) for optimizer in optimizers]
        self.assert_equal_steps(
            (ours, optimizers[0]), (theirs, optimizers[1]), lambda step: [s.step() for s in schedulers]
        )

    def test_without_correct_bias_the_moments_are_taken_as_they_are(self) -> None:
        p = nn.Parameter(torch.zeros(3))
        p.grad = torch.tensor([1.0, -2.0, 0.0])
        DiodeMix([p], lr=0.1, betas=(0.9, 0.99), correct_bias=False).step()
        assert torch.allclose(p, torch.tensor([-0.1, 0.1, 0.0]), rtol=1e-4)  # (1 - 0.9) / sqrt(1 - 0.99) = 1

    def test_channel_memory_divides_large_matrices_by_the_mean_square_of_their_rows(self) -> None:
        p, lr, betas, eps = nn.Parameter(torch.randn(64, 16, 2, 2)), 0.01, (0.9, 0.99), 1e-6
        optimizer = DiodeMix([p], lr=lr, betas=betas, eps=eps, memory="channel")
        expected, v = p.detach().double(), torch.zeros(64, 1, 1, 1, dtype=torch.float64)
        for t in range(1, 6):
            p.grad = torch.randn_like(p) * torch.linspace(0.1, 3, 64).view(-1, 1, 1, 1)
            v = betas[1] * v + (1 - betas[1]) * p.grad.double().square().mean((1, 2, 3), keepdim=True)
            expected -= lr * p.grad.double() / ((v / (1 - betas[1] ** t)).sqrt() + eps)
            optimizer.step()
        torch.testing.assert_close(p.detach().double(), expected, rtol=1e-5, atol=1e-6)
        assert sum(t.numel() for t in tensors_in(optimizer.state[p])) == 65


class TestPackedParameters:
    @pytest.mark.parametrize("w_bit", [1, 4, 8])
    @pytest.mark.parametrize("memory", MEMORIES)
    def test_training_lowers_the_loss_and_moves_the_codes(self, memory: str, w_bit: int) -> None:
        task = Task(w_bit=w_bit)
        codes, scales = [p.codes for p in task.packed], [p.channel_scale.clone() for p in task.packed]
        first = sum(task.loss(i).item() for i in range(4))
        optimizer = DiodeMix(task.parameters(), lr=1e-2, memory=memory)
        schedule = lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 30)
        for step in range(30):
            train(task, optimizer, range(step, step + 1))
            schedule.step()
        assert sum(task.loss(i).item() for i in range(4)) < 0.5 * first
        for p, before, scale in zip(task.packed, codes, scales, strict=True):
            assert type(p) is nBitConvParameter and p.dtype == torch.float32
            assert not torch.equal(p.codes, before)
            assert torch.equal(p.channel_scale, scale)  # decay and learn_scale are off

    @pytest.mark.parametrize("memory", MEMORIES)
    def test_activations_gradients_and_scale_in_low_bits_train_too(self, memory: str) -> None:
        task = Task(a_bit=8, g_bit=8, learn_scale=True)
        first = task.loss().item()
        codes, scales = [p.codes for p in task.packed], [p.channel_scale.clone() for p in task.packed]
        train(task, DiodeMix(task.parameters(), lr=1e-2, memory=memory), range(30))
        assert task.loss().item() < 0.5 * first
        for p, before, scale in zip(task.packed, codes, scales, strict=True):
            assert not torch.equal(p.codes, before) and not torch.equal(p.channel_scale, scale)

    def test_it_steps_as_update_does(self) -> None:
        weight = nBitConvParameter(torch.randn(6, 5, 3, 3), w_bit=3)
        other, v, m, step = copy.deepcopy(weight), *(torch.zeros(weight.shape) for _ in range(2)), torch.zeros(())
        optimizer = DiodeMix([weight], 1e-2, (0.8, 0.9), 1e-5, 0.1, dtype=torch.float64, memory="fp32")
        for _ in range(4):
            weight.grad = torch.randn(weight.shape)
            optimizer.step()
            other.update(other, v, m, step, 1e-2, 0.1, 0.8, 0.9, 1e-5, torch.float64, None, None, weight.grad)
        assert bits_of(weight) == bits_of(other)

    @pytest.mark.parametrize("memory", MEMORIES)
    def test_a_zero_gradient_moves_nothing(self, memory: str) -> None:
        task = Task()
        train(task, DiodeMix(task.parameters(), memory=memory), range(1))
        optimizer = DiodeMix(task.parameters(), lr=0.1, memory=memory)
        before = [bits_of([p.packed, p.residual, p.channel_scale]) for p in task.packed]
        for p in task.parameters():
            p.grad = torch.zeros(p.shape)
        for _ in range(3):
            optimizer.step()
        assert [bits_of([p.packed, p.residual, p.channel_scale]) for p in task.packed] == before

    def test_parameters_without_a_gradient_stay_and_get_no_state(self) -> None:
        task = Task()
        for p in task.conv.parameters():
            p.requires_grad_(False)
        before = bits_of(task.conv)
        optimizer = DiodeMix(task.parameters(), weight_decay=0.1)
        train(task, optimizer, range(3))
        assert bits_of(task.conv) == before
        assert not any(p in optimizer.state for p in task.conv.parameters())
        assert all(p in optimizer.state for p in task.up.parameters())

    def test_a_schedule_scales_the_steps(self) -> None:
        weight = nBitConvParameter(torch.zeros(64, 64, 1, 1), w_bit=8, scale=1e-3)
        optimizer = DiodeMix([weight], lr=4e-3)
        schedule = lr_scheduler.LambdaLR(optimizer, lambda step: [1.0, 0.0, 0.5, 2.0][step])
        moved = []
        for _ in range(4):
            before = weight.level_values()
            weight.grad = torch.ones(weight.shape)
            optimizer.step()
            moved.append(float((before - weight.level_values()).mean()))
            if len(moved) < 4:
                schedule.step()
        assert moved == pytest.approx([4e-3, 0.0, 2e-3, 8e-3], rel=0.02)

    @pytest.mark.parametrize("memory", MEMORIES)
    def test_a_step_notices_what_was_replaced_since_the_last_one(self, memory: str) -> None:
        """What is prepared for a weight is for the tensors of its last step; a new optimizer has prepared nothing."""

        def moments_elsewhere(task: Task, optimizer: DiodeMix) -> None:
            for p in task.packed:
                optimizer.state[p] |= {k: v.clone() for k, v in optimizer.state[p].items()}

        def scales_negative(task: Task, optimizer: DiodeMix) -> None:
            for p in task.packed:
                p.multiply_channels_(-torch.ones(p.channel_scale.numel()))

        def residuals_dropped(task: Task, optimizer: DiodeMix) -> None:
            for p in task.packed:
                dropped = weakref.ref(p.residual)
                p.drop_residual_()
                assert dropped() is None  # nobody keeps it

        def double(task: Task, optimizer: DiodeMix) -> None:
            optimizer.param_groups[0]["dtype"] = torch.float64

        def bfloat16(task: Task, optimizer: DiodeMix) -> None:
            task.conv.to(torch.bfloat16)
            task.conv.register_forward_hook(lambda module, x, y: y.float())

        def codes_replaced(task: Task, optimizer: DiodeMix) -> None:
            for p in task.packed:
                p.packed = p.packed.flip(0)

        task, other = Task(), Task()
        optimizers = [DiodeMix(t.parameters(), lr=1e-2, memory=memory) for t in (task, other)]
        for change in (moments_elsewhere, scales_negative, residuals_dropped, double, codes_replaced, bfloat16):
            for t, optimizer in zip((task, other), optimizers, strict=True):
                train(t, optimizer, range(2))
                change(t, optimizer)
            fresh = DiodeMix(other.parameters(), lr=1e-2, memory=memory)
            fresh.load_state_dict(optimizers[1].state_dict())
            optimizers[1] = fresh
            for t, optimizer in zip((task, other), optimizers, strict=True):
                train(t, optimizer, range(2))
            assert bits_of([task, optimizers[0]]) == bits_of([other, optimizers[1]])

    @pytest.mark.parametrize("memory", MEMORIES)
    def test_a_gradient_in_another_order_of_memory_steps_as_its_values_do(self, memory: str) -> None:
        weights = [PackedParameter(torch.linspace(-1, 1, 63).view(9, 7), w_bit=4) for _ in range(2)]
        optimizers = [DiodeMix([weight], lr=0.1, memory=memory) for weight in weights]
        for ordered in (True, False, False, True):
            grad = torch.randn(9, 7)
            weights[0].grad, weights[1].grad = grad, grad if ordered else grad.t().contiguous().t()
            for optimizer in optimizers:
                optimizer.step()
            assert bits_of([weights[0], optimizers[0]]) == bits_of([weights[1], optimizers[1]])

    def test_a_moment_that_does_not_fit_is_refused_whatever_was_prepared(self) -> None:
        weight = nBitConvParameter(torch.randn(6, 5, 3, 3))
        optimizer = DiodeMix([weight], memory="fp32")
        for _ in range(2):
            weight.grad = torch.randn(weight.shape)
            optimizer.step()
        optimizer.state[weight]["exp_avg_l"] = torch.zeros(6, 5, 3, 2)
        before = bits_of([weight, optimizer])
        with pytest.raises(ValueError, match="exp_avg_l must have the gradient's shape"):
            optimizer.step()
        assert bits_of([weight, optimizer]) == before

    def test_a_plateau_schedule_works(self) -> None:
        task = Task()
        optimizer = DiodeMix(task.parameters(), lr=1e-3)
        schedule = lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
        for step in range(3):
            train(task, optimizer, range(step, step + 1))
            schedule.step(1.0)
        assert optimizer.param_groups[0]["lr"] == 2.5e-4


@pytest.mark.parametrize("w_bit", [1, 3, 8])
@pytest.mark.parametrize("shape", [(64, 64, 3, 3), (96, 64, 5, 3)], ids=str)
@pytest.mark.parametrize(
    ("memory", "expected"), [("fp32", 9), ("bf16", 5), ("fp16", 5), ("8bit", 3.06), ("channel", 1.02)]
)
def test_bytes_a_weight_are_those_of_the_docstring(
    memory: str, expected: float, shape: tuple[int, ...], w_bit: int
) -> None:
    weight = nBitConvParameter(torch.randn(shape) * 0.05, w_bit=w_bit)
    optimizer = DiodeMix([weight], memory=memory)
    for _ in range(2):
        weight.grad = torch.randn(shape)
        optimizer.step()
    weight.grad = None
    held = list(tensors_in([vars(weight), optimizer.state_dict()["state"]]))
    stored = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held if t.numel()}
    each = sum(stored.values()) / weight.numel()
    assert each <= 1.05 if memory == "channel" else abs(each - expected) < 0.015
    assert f'"{memory}"' in (DiodeMix.__doc__ or "") and f"{expected:g}" in (DiodeMix.__doc__ or "")


class TestGaLore:
    def adam_in_low_rank(self, grads: list[Tensor], lr: float, memory_of: dict[str, Any]) -> Tensor:
        """What the weight has moved by, in float64: Adam in the projected space, projected back each step."""
        projector = GaLoreProjector(**memory_of)
        total, m, v = torch.zeros(grads[0].shape, dtype=torch.float64), 0.0, 0.0
        for t, grad in enumerate(grads, start=1):
            low = projector.project(grad, t - 1).double()
            m, v = 0.9 * m + 0.1 * low, 0.99 * v + 0.01 * low.square()
            direction = m / (1 - 0.9**t) / ((v / (1 - 0.99**t)).sqrt() + 1e-6)
            total -= lr * projector.project_back(direction)
        return total

    @pytest.mark.parametrize("proj_type", PROJ_TYPES)
    @pytest.mark.parametrize("shape", [(12, 7), (7, 12), (6, 3, 3, 3)], ids=str)
    def test_a_float_parameter_steps_in_the_projected_gradient(self, shape: tuple[int, ...], proj_type: str) -> None:
        options = GALORE | {"proj_type": proj_type}
        p = nn.Parameter(torch.randn(shape))
        start, grads = p.detach().clone(), [torch.randn(shape) for _ in range(8)]
        optimizer = DiodeMix([{"params": [p], **options}], lr=0.01, betas=(0.9, 0.99))
        for grad in grads:
            p.grad = grad
            optimizer.step()
        moved = self.adam_in_low_rank([g.flatten(1) for g in grads], 0.01, options).view(shape)
        torch.testing.assert_close((p - start).double(), moved, rtol=1e-3, atol=1e-5)

    @pytest.mark.parametrize("memory", ["fp32", "bf16", "fp16", "8bit"])
    @pytest.mark.parametrize("proj_type", PROJ_TYPES)
    def test_a_packed_convolution_steps_in_the_projected_gradient(self, proj_type: str, memory: str) -> None:
        options, lr = GALORE | {"proj_type": proj_type, "rank": 4}, 0.2 if proj_type == "full" else 0.05
        weight = nBitConvParameter(torch.randn(16, 8, 3, 3) * 0.05, w_bit=4, scale=0.08)
        start, grads = weight.level_values().double(), [torch.randn(16, 8, 3, 3) for _ in range(8)]
        optimizer = DiodeMix([{"params": [weight], **options}], lr=lr, betas=(0.9, 0.99), memory=memory)
        for grad in grads:
            weight.grad = grad
            optimizer.step()
        moved = self.adam_in_low_rank([g.flatten(1) for g in grads], lr, options)
        error = weight.level_values() - start - moved
        level = level_size(weight)
        # rounding: 8 times at most half a level's standard deviation; 8-bit moments are off by some percent
        rounding = (8 / 4) ** 0.5 * level
        tolerance = {"fp32": 0.0, "bf16": 0.02, "fp16": 0.02, "8bit": 0.1}[memory] * float(moved.square().mean().sqrt())
        assert float(error.square().mean().sqrt()) < rounding + tolerance
        assert float(moved.square().mean().sqrt()) > 2 * level  # so that the comparison says something

    @pytest.mark.parametrize("memory", ["fp32", "8bit"])
    def test_moments_have_the_projected_size(self, memory: str) -> None:
        weight, matrix = nBitConvParameter(torch.randn(64, 32, 3, 3)), nn.Parameter(torch.randn(64, 32))
        bias = nn.Parameter(torch.randn(64))
        optimizer = DiodeMix([{"params": [weight, matrix, bias], **GALORE, "rank": 8}], memory=memory)
        for p in (weight, matrix, bias):
            p.grad = torch.randn(p.shape)
        optimizer.step()
        state = [optimizer.state[p] for p in (weight, matrix, bias)]
        if memory == "fp32":
            assert state[0]["exp_avg_s"].shape == state[0]["exp_avg_l"].shape == (8, 288)
        assert sum(t.nbytes for k, t in state[0].items() if "avg" in k) <= 8 * 288 * (8 if memory == "fp32" else 2.07)
        assert state[1]["exp_avg_s"].shape == (64, 8)
        assert "projector" not in state[2] and state[2]["exp_avg_s"].shape == (64,)

    def test_bases_are_renewed_every_update_proj_gap_steps(self) -> None:
        task, bases = Task(), []
        optimizer = DiodeMix([{"params": task.parameters(), **GALORE}], lr=1e-3)
        for step in range(7):
            train(task, optimizer, range(step, step + 1))
            projectors = [optimizer.state[p]["projector"] for p in (task.conv.weight, task.head.weight)]
            bases.append([p.ortho_matrix.clone() for p in projectors])
            assert [(p.rank, p.update_proj_gap, p.scale, p.proj_type) for p in projectors] == [(2, 3, 0.5, "std")] * 2
        for layer in range(2):
            renewed = [not torch.equal(bases[i][layer], bases[i + 1][layer]) for i in range(6)]
            assert renewed == [False, False, True, False, False, True]

    @pytest.mark.parametrize("proj_type", PROJ_TYPES)
    def test_training_lowers_the_loss(self, proj_type: str) -> None:
        task, first = Task(), Task().loss().item()
        codes = [p.codes for p in task.packed]
        train(task, DiodeMix([{"params": task.parameters(), **GALORE, "proj_type": proj_type}], lr=1e-2), range(60))
        assert task.loss().item() < 0.5 * first
        assert not any(torch.equal(p.codes, before) for p, before in zip(task.packed, codes, strict=True))


def resuming(task: Task, name: str) -> DiodeMix:
    if name == "GaLore":
        return DiodeMix([{"params": task.parameters(), **GALORE}], lr=1e-2)
    if name == "GaLore full in fp32":
        return DiodeMix([{"params": task.parameters(), **GALORE, "proj_type": "full"}], lr=1e-2, memory="fp32")
    if name == "two groups":
        others = [p for p in task.parameters() if not isinstance(p, PackedParameter)]
        groups = [{"params": task.packed, "memory": "bf16"}, {"params": others, "lr": 1e-3}]
        return DiodeMix(groups, lr=1e-2, weight_decay=0.1)
    return DiodeMix(task.parameters(), lr=1e-2, weight_decay=0.1, memory=name)


class TestCopies:
    KINDS = (*MEMORIES, "GaLore", "GaLore full in fp32", "two groups")

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("stored", ["in memory", "in a file"])
    def test_a_state_dict_resumes_to_the_bit(self, stored: str, kind: str, tmp_path: Path) -> None:
        task = Task(learn_scale=True)
        optimizer = resuming(task, kind)
        train(task, optimizer, range(4))
        saved = copy.deepcopy({"model": task.state_dict(), "optimizer": optimizer.state_dict()})
        if stored == "in a file":
            torch.save(saved, tmp_path / "c.pt")
            saved = torch.load(tmp_path / "c.pt", weights_only=True)
        before = bits_of([task, optimizer])
        train(task, optimizer, range(4, 9))
        resumed = Task(seed=7, learn_scale=True)
        other = resuming(resumed, kind)
        train(resumed, other, range(1))  # a state of its own, which has to go
        resumed.load_state_dict(saved["model"])
        other.load_state_dict(saved["optimizer"])
        assert bits_of([resumed, other]) == before
        train(resumed, other, range(4, 9))
        assert bits_of([resumed, other]) == bits_of([task, optimizer])

    @pytest.mark.parametrize("kind", KINDS)
    def test_a_loaded_state_shares_nothing_with_what_it_was_loaded_from(self, kind: str) -> None:
        task = Task()
        optimizer, other = resuming(task, kind), resuming(task, kind)
        train(task, optimizer, range(2))
        state_dict = optimizer.state_dict()
        before = bits_of(state_dict)
        other.load_state_dict(state_dict)
        train(task, other, range(2, 5))
        assert bits_of(optimizer) == before

    def test_a_state_dict_holds_tensors_and_plain_values_only(self) -> None:
        task = Task()
        optimizer = resuming(task, "GaLore")
        train(task, optimizer, range(2))

        def kinds(value: Any) -> set[type]:
            items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
            return {type(value)}.union(*map(kinds, items))

        allowed = {dict, list, tuple, Tensor, int, float, bool, str, type(None), torch.dtype}
        assert kinds(optimizer.state_dict()) <= allowed

    @pytest.mark.parametrize("kind", KINDS)
    def test_a_deepcopy_goes_on_as_the_original_and_alone(self, kind: str) -> None:
        task = Task()
        optimizer = resuming(task, kind)
        train(task, optimizer, range(3))
        task2, optimizer2 = copy.deepcopy((task, optimizer))
        assert bits_of([task2, optimizer2]) == (before := bits_of([task, optimizer]))
        assert {id(p) for group in optimizer2.param_groups for p in group["params"]} == set(map(id, task2.parameters()))
        train(task2, optimizer2, range(3, 6))
        assert bits_of([task, optimizer]) == before != bits_of([task2, optimizer2])
        train(task, optimizer, range(3, 6))
        assert bits_of([task, optimizer]) == bits_of([task2, optimizer2])

    def test_a_state_of_other_groups_is_refused(self) -> None:
        task = Task()
        optimizer, other = DiodeMix(task.parameters()), DiodeMix(task.head.parameters())
        train(task, optimizer, range(1))
        before = bits_of(optimizer)
        with pytest.raises(ValueError, match="doesn't match the size of optimizer's group"):
            optimizer.load_state_dict(other.state_dict())
        assert bits_of(optimizer) == before


class TestTorchsTrainingTools:
    def test_grad_scaler_unscales_and_skips_steps_with_inf(self) -> None:
        task, plain = Task(), Task()
        optimizers = DiodeMix(task.parameters(), lr=1e-2), DiodeMix(plain.parameters(), lr=1e-2)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
        for step in range(6):
            optimizers[0].zero_grad()
            scaler.scale(task.loss(step)).backward()
            if step == 3:
                assert task.conv.weight.grad is not None
                task.conv.weight.grad[0, 0, 0, 0] = float("inf")
                before = bits_of([task, optimizers[0]])
            scaler.step(optimizers[0])
            scaler.update()
            if step == 3:
                assert bits_of([task, optimizers[0]]) == before
                assert scaler.get_scale() == 512.0
            else:
                train(plain, optimizers[1], range(step, step + 1))
        assert bits_of([task, optimizers[0]]) == bits_of([plain, optimizers[1]])

    @pytest.mark.parametrize("foreach", [None, False, True])
    def test_clip_grad_norm_counts_packed_weights(self, foreach: bool | None) -> None:
        task = Task()
        optimizer = DiodeMix(task.parameters(), lr=1e-2)
        task.loss().backward()
        grads = [p.grad.clone() for p in task.parameters() if p.grad is not None]
        norm = torch.cat([g.view(-1) for g in grads]).double().norm()
        total = nn.utils.clip_grad_norm_(task.parameters(), float(norm) / 4, foreach=foreach)
        assert float(total) == pytest.approx(float(norm), rel=1e-5)
        for p, grad in zip(task.parameters(), grads, strict=True):
            torch.testing.assert_close(p.grad, grad / 4, rtol=1e-4, atol=0.0)
        before = task.conv.weight.level_values()
        optimizer.step()
        assert not torch.equal(task.conv.weight.level_values(), before)

    def test_a_closure_is_called_once_with_gradients_on_and_its_loss_returned(self) -> None:
        task, other = Task(), Task()
        optimizers, calls = [DiodeMix(t.parameters(), lr=1e-2) for t in (task, other)], []

        def closure() -> float:
            calls.append(torch.is_grad_enabled())
            optimizers[0].zero_grad()
            loss = task.loss(len(calls) - 1)
            loss.backward()
            return loss.item()

        for step in range(3):
            expected = other.loss(step).item()
            assert optimizers[0].step(closure) == expected
            train(other, optimizers[1], range(step, step + 1))
        assert calls == [True] * 3
        assert bits_of([task, optimizers[0]]) == bits_of([other, optimizers[1]])

    def test_step_without_a_closure_returns_none(self) -> None:
        assert DiodeMix(Task().parameters()).step() is None

    def test_accumulated_gradients_are_stepped_as_their_sum(self) -> None:
        task, other = Task(), Task()
        optimizers = [DiodeMix(t.parameters(), lr=1e-2) for t in (task, other)]
        for i in range(2):
            task.loss(i).backward()
        first, second = (torch.autograd.grad(other.loss(i), list(other.parameters())) for i in range(2))
        for p, a, b in zip(other.parameters(), first, second, strict=True):
            p.grad = a + b
        for optimizer in optimizers:
            optimizer.step()
        assert bits_of(task) == bits_of(other)

    def test_step_hooks_are_called(self) -> None:
        task, seen = Task(), []
        optimizer = DiodeMix(task.parameters())
        optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
        optimizer.register_step_post_hook(lambda *_: seen.append("after"))
        train(task, optimizer, range(1))
        assert seen == ["before", "after"]


class TestStepInBackward:
    @pytest.mark.parametrize("kind", [*MEMORIES, "GaLore", "two groups"])
    def test_it_gives_the_bits_of_step(self, kind: str) -> None:
        task, other = (Task(learn_scale=True) for _ in range(2))
        optimizer, reference = resuming(task, kind), resuming(other, kind)
        optimizer.step_in_backward()
        for step in range(6):
            task.loss(step).backward()
            assert all(p.grad is None for p in task.parameters())
            optimizer.step()  # finds nothing left to do
            train(other, reference, range(step, step + 1))
        assert bits_of(task) == bits_of(other)
        for p, q in zip(task.parameters(), other.parameters(), strict=True):  # the order of steps is another one
            states = [{k: bits_of(v) for k, v in o.state[x].items()} for o, x in ((optimizer, p), (reference, q))]
            assert states[0] == states[1]

    def test_a_weight_that_is_used_twice_steps_once_with_its_whole_gradient(self) -> None:
        weights = [nBitConvParameter(torch.linspace(-1, 1, 81).view(3, 3, 3, 3)) for _ in range(2)]
        optimizers = [DiodeMix([weight], lr=1e-2) for weight in weights]
        optimizers[0].step_in_backward()
        x = torch.randn(2, 3, 9, 9)
        for weight in weights:
            F.conv2d(F.conv2d(x, weight), weight).square().mean().backward()
        optimizers[1].step()
        assert bits_of(weights[0]) == bits_of(weights[1])
        assert float(optimizers[0].state[weights[0]]["step"]) == 1

    def test_gradients_exist_one_layer_at_a_time(self) -> None:
        task, alive = Task(), []
        DiodeMix(task.parameters()).step_in_backward()
        for p in task.parameters():
            p.register_post_accumulate_grad_hook(
                lambda _: alive.append(sum(p.grad is not None for p in task.parameters()))
            )
        task.loss().backward()
        assert len(alive) == 6 and max(alive) <= 2  # a weight, and its bias where that was first

    def test_a_step_takes_the_learning_rate_of_that_moment(self) -> None:
        weight = nBitConvParameter(torch.zeros(8, 8, 1, 1), w_bit=8, scale=1.0)
        optimizer = DiodeMix([weight], lr=1.0)
        optimizer.step_in_backward()
        (weight * 1.0).sum().backward()
        optimizer.param_groups[0]["lr"] = 3.0
        (weight * 1.0).sum().backward()
        assert weight.codes.unique().tolist() == [-4]

    def test_the_learning_rate_can_be_set_after_a_state_was_loaded(self) -> None:
        weight = nBitConvParameter(torch.zeros(8, 8, 1, 1), w_bit=8, scale=1.0)
        optimizer = DiodeMix([weight], lr=1.0)
        optimizer.step_in_backward()
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.param_groups[0]["lr"] = 3.0
        (weight * 1.0).sum().backward()
        assert weight.codes.unique().tolist() == [-3]

    def test_groups_that_are_taken_out_and_reordered_keep_their_rates(self) -> None:
        weights = [nBitConvParameter(torch.zeros(8, 8, 1, 1), w_bit=8, scale=1.0) for _ in range(3)]
        optimizer = DiodeMix([{"params": [w], "lr": lr} for w, lr in zip(weights, (1.0, 2.0, 4.0), strict=True)])
        optimizer.step_in_backward()
        optimizer.param_groups.pop(0)
        optimizer.param_groups.reverse()
        sum((w * 1.0).sum() for w in weights).backward()
        assert [w.codes.unique().tolist() for w in weights] == [[0], [-2], [-4]]
        assert [w.grad is None for w in weights] == [False, True, True]

    def test_removed_handles_end_it(self) -> None:
        task = Task()
        optimizer = DiodeMix(task.parameters(), lr=1e-2)
        handles = optimizer.step_in_backward()
        assert len(handles) == len(list(task.parameters()))
        task.loss().backward()
        for handle in handles:
            handle.remove()
        before = bits_of([task, optimizer])
        task.loss(1).backward()
        assert bits_of([task, optimizer]) == before
        assert all(p.grad is not None for p in task.parameters())
        optimizer.step()
        assert bits_of([task, optimizer]) != before

    def test_frozen_parameters_have_no_hook(self) -> None:
        task = Task()
        task.conv.weight.requires_grad_(False)
        before = bits_of(task.conv.weight)
        optimizer = DiodeMix(task.parameters())
        assert len(optimizer.step_in_backward()) == len(list(task.parameters())) - 1
        task.loss().backward()
        assert bits_of(task.conv.weight) == before

    def test_a_gradient_that_is_not_finite_raises_and_leaves_its_weight(self) -> None:
        weight = nBitConvParameter(torch.randn(2, 3))
        before, optimizer = bits_of(weight), DiodeMix([weight])
        optimizer.step_in_backward()
        with pytest.raises(ValueError, match="gradient has NaN or Inf entries"):
            (weight * float("nan")).sum().backward()
        assert bits_of(weight) == before and not optimizer.state


class TestErrors:
    @pytest.mark.parametrize("kind", [*MEMORIES, "GaLore", "two groups"])
    @pytest.mark.parametrize("value", [float("nan"), -float("inf"), 1.01e18, 1e25])
    @pytest.mark.parametrize("steps", [0, 2], ids=["first step", "third step"])
    def test_one_bad_gradient_of_several_changes_nothing_anywhere(self, steps: int, value: float, kind: str) -> None:
        task = Task(learn_scale=True)
        optimizer = resuming(task, kind)
        train(task, optimizer, range(steps))
        for bad in task.parameters():
            optimizer.zero_grad()
            task.loss(steps).backward()
            before = bits_of([task, optimizer])
            assert bad.grad is not None
            bad.grad.view(-1)[-1] = value
            with pytest.raises(ValueError, match="no weight and no state was changed"):
                optimizer.step()
            assert bits_of([task, optimizer]) == before
        train(task, optimizer, range(steps, steps + 1))
        assert bits_of([task, optimizer]) != before

    @pytest.mark.parametrize("memory", MEMORIES)
    @pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
    def test_gradients_up_to_1e18_are_taken_in_any_layout(self, layout: torch.memory_format, memory: str) -> None:
        for shape in ((3, 1, 1, 1), (4, 7, 3, 3), (2, 300, 1, 1)):  # 600 such squares are more than float32 holds
            weight = nBitConvParameter(torch.randn(shape))
            optimizer = DiodeMix([weight], memory=memory)
            few = torch.zeros(shape)
            few.view(-1)[-1] = -9.9e17
            for grad in (torch.full(shape, 9.9e17), few):
                weight.grad = grad.contiguous(memory_format=layout)
                before = bits_of(weight)
                optimizer.step()
                assert bits_of(weight) != before
            before = bits_of([weight, optimizer])
            for sign in (1, -1):
                few.view(-1)[-1] = sign * 1.01e18
                weight.grad = few.contiguous(memory_format=layout)
                with pytest.raises(ValueError, match="beyond 1e[+]18; no weight and no state was changed"):
                    optimizer.step()
                assert bits_of([weight, optimizer]) == before

    def test_a_step_with_channel_memory_is_the_update_of_its_parameters(self) -> None:
        ours, theirs = Task(learn_scale=True), Task(learn_scale=True)
        optimizer = DiodeMix(ours.packed, lr=1e-2, memory="channel")
        moments = [torch.zeros(p.channel_scale.numel()) for p in theirs.packed]
        steps = [torch.zeros(()) for _ in moments]
        for t in range(3):
            for task in (ours, theirs):
                task.zero_grad()
                task.loss(t).backward()
            optimizer.step()
            for p, v, step in zip(theirs.packed, moments, steps, strict=True):
                p.update(p, v, None, step, lr=1e-2, beta1=0.9, beta2=0.999, correct_bias=True)
        assert bits_of(ours.packed) == bits_of(theirs.packed)
        for p, v in zip(ours.packed, moments, strict=True):
            assert torch.equal(optimizer.state[p]["exp_avg_s"].view(-1), v)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"lr": -1e-3}, "lr must be at least 0, got -0.001"),
            ({"lr": float("nan")}, "lr must be at least 0, got nan"),
            ({"eps": -1.0}, "eps must be at least 0, got -1.0"),
            ({"weight_decay": -0.1}, "weight_decay must be at least 0, got -0.1"),
            ({"betas": (1.0, 0.9)}, r"betas must be at least 0 and below 1, got \(1.0, 0.9\)"),
            ({"betas": (0.9, 1.0)}, r"betas must be at least 0 and below 1, got \(0.9, 1.0\)"),
            ({"betas": (-0.1, 0.9)}, r"betas must be at least 0 and below 1, got \(-0.1, 0.9\)"),
            ({"memory": "int4"}, "memory must be one of fp32, bf16, fp16, 8bit, channel, got 'int4'"),
        ],
        ids=str,
    )
    def test_settings_that_make_no_sense_are_refused(self, settings: dict[str, Any], message: str) -> None:
        task = Task()
        with pytest.raises(ValueError, match=message):
            DiodeMix(task.parameters(), **settings)
        with pytest.raises(ValueError, match=message):
            DiodeMix([{"params": task.parameters(), **settings}])
        optimizer = DiodeMix(task.conv.parameters())
        with pytest.raises(ValueError, match=message):
            optimizer.add_param_group({"params": task.head.parameters(), **settings})
        assert len(optimizer.param_groups) == 1
        self.assert_refused_in_backward(settings, message)

    def assert_refused_in_backward(self, settings: dict[str, Any], message: str) -> None:
        task = Task()
        optimizer = DiodeMix(task.parameters())
        optimizer.step_in_backward()
        optimizer.param_groups[0].update(settings)
        before = bits_of([task, optimizer])
        with pytest.raises((ValueError, TypeError), match=message):
            task.loss().backward()
        assert bits_of([task, optimizer]) == before

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"rank": 0}, "rank must be at least 1, got 0"),
            ({"rank": 2, "update_proj_gap": 0}, "update_proj_gap must be at least 1, got 0"),
            ({"rank": 2, "proj_type": "up"}, "proj_type must be one of .*, got 'up'"),
            ({"lr": float("inf")}, "lr must be .*, got inf"),
            ({"dtype": torch.int32}, "dtype must be a floating point type, got torch.int32"),
        ],
        ids=str,
    )
    def test_settings_of_a_later_group_are_refused_before_any_parameter_has_moved(
        self, settings: dict[str, Any], message: str
    ) -> None:
        task = Task()
        before = bits_of(task)
        task.loss().backward()
        with pytest.raises((ValueError, TypeError), match=message):
            DiodeMix([{"params": task.head.parameters()}, {"params": task.packed, **settings}]).step()
        assert bits_of(task) == before
        self.assert_refused_in_backward(settings, message)

    def test_a_learning_rate_that_is_set_to_nan_later_moves_nothing(self) -> None:
        task = Task()
        optimizer = DiodeMix([{"params": task.head.parameters()}, {"params": task.packed}])
        optimizer.param_groups[1]["lr"] = float("nan")
        task.loss().backward()
        before = bits_of([task, optimizer])
        with pytest.raises(ValueError, match="lr must be .*, got nan"):
            optimizer.step()
        assert bits_of([task, optimizer]) == before

    def test_channel_memory_and_galore_are_refused_together(self) -> None:
        for make in (
            lambda p: DiodeMix([{"params": p, "rank": 2}], memory="channel"),
            lambda p: DiodeMix([{"params": p, "rank": 2, "memory": "channel"}]),
        ):
            with pytest.raises(ValueError, match="memory='channel' needs the gradient of every channel"):
                make(Task().parameters())

    def test_parameters_of_two_groups_and_no_parameters_are_refused_as_by_torch(self) -> None:
        task = Task()
        with pytest.raises(ValueError, match="some parameters appear in more than one parameter group"):
            DiodeMix([{"params": task.parameters()}, {"params": task.conv.parameters()}])
        with pytest.raises(ValueError, match="optimizer got an empty parameter list"):
            DiodeMix([])


@pytest.fixture
def bfloat16_by_default() -> Iterator[None]:
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("bfloat16_by_default")
@pytest.mark.parametrize("memory", MEMORIES)
def test_counters_and_moments_of_channels_are_float32_whatever_the_default(memory: str) -> None:
    weight = nBitConvParameter(torch.randn(4, 3, dtype=torch.float32), learn_scale=True)
    others = [nn.Parameter(torch.randn(64, 64, dtype=dtype)) for dtype in (torch.float32, torch.bfloat16)]
    optimizer = DiodeMix([weight, *others], memory=memory)
    for _ in range(300):
        for p in (weight, *others):
            p.grad = torch.ones_like(p)
        optimizer.step()
    assert [float(optimizer.state[p]["step"]) for p in (weight, *others)] == [300.0] * 3
    assert weight.scale_moments is not None and weight.scale_moments.dtype == torch.float32
    assert all(optimizer.state[p]["exp_avg_s"].dtype == torch.float32 for p in others)


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("shape", [(0, 3), (3, 0)], ids=str)
def test_a_weight_of_no_elements_is_stepped(shape: tuple[int, int], memory: str) -> None:
    weight = nBitConvParameter(torch.zeros(shape))
    weight.grad = torch.zeros(shape)
    optimizer = DiodeMix([weight], memory=memory)
    optimizer.step()
    assert float(optimizer.state[weight]["step"]) == 1


def test_betas_that_are_not_two_are_refused() -> None:
    with pytest.raises(ValueError, match=r"betas must be two numbers, \(beta1, beta2\), got \(0.9,\)"):
        DiodeMix([nBitConvParameter(torch.randn(4, 3))], betas=(0.9,))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["sparse", "complex"])
def test_gradients_that_are_sparse_or_complex_are_refused_before_anything_changes(kind: str) -> None:
    weight = nBitConvParameter(torch.randn(4, 3))
    table = nn.Embedding(5, 3, sparse=True)
    other = table.weight if kind == "sparse" else nn.Parameter(torch.randn(4, dtype=torch.complex64))
    loss = table(torch.tensor([1])).sum() if kind == "sparse" else other.abs().sum()
    (loss + weight.sum()).backward()
    optimizer, codes = DiodeMix([weight, other], lr=0.5), weight.codes
    with pytest.raises(TypeError, match=f"dense, real gradients, got a {kind} one, of shape"):
        optimizer.step()
    assert torch.equal(weight.codes, codes) and not optimizer.state
