import copy
import logging
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitorch_engine.optim.galore_projector import GaLoreProjector

PROJ_TYPES = ["std", "reverse_std", "right", "left", "full"]
SHAPES = [(12, 5), (5, 12), (7, 7), (6, 3, 3, 3), (4, 3, 5), (4, 2, 2, 3, 2), (9, 1), (1, 9)]


def of_rank(shape: tuple[int, ...], rank: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A random tensor that is a matrix of that rank when it is flattened to (shape[0], the rest)."""
    rows, columns = shape[0], math.prod(shape[1:])
    return (torch.randn(rows, rank) @ torch.randn(rank, columns)).view(shape).to(dtype)


def truncated(grad: Tensor, rank: int) -> Tensor:
    """The best approximation of that rank, from a decomposition in double (Eckart & Young 1936)."""
    left, values, right = torch.linalg.svd(grad.double().flatten(1), full_matrices=False)
    return ((left[:, :rank] * values[:rank]) @ right[:rank]).view(grad.shape)


def bases(projector: GaLoreProjector) -> list[Tensor]:
    basis = projector.ortho_matrix
    return basis if isinstance(basis, list) else [basis]


@pytest.mark.parametrize("proj_type", PROJ_TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_projection_is_the_best_approximation_of_its_rank(proj_type, shape):
    grad, rank = torch.randn(shape), 3
    projector = GaLoreProjector(rank, proj_type=proj_type)
    back = projector.project_back(projector.project(grad, 0))
    assert back.shape == grad.shape and back.dtype == grad.dtype
    torch.testing.assert_close(back.double(), truncated(grad, rank), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("proj_type", PROJ_TYPES)
@pytest.mark.parametrize("shape", [(12, 15), (15, 12), (8, 4, 3, 3)])
def test_gradients_within_the_basis_lose_nothing_until_it_is_due_again(proj_type, shape):
    grad = of_rank(shape, 4)
    projector = GaLoreProjector(4, proj_type=proj_type)
    projector.project(grad, 0)
    # Rows and columns of these lie in the same spaces as those of grad.
    for other in (grad * -3, (grad.flatten(1) @ grad.flatten(1).t() @ grad.flatten(1)).view(shape)):
        back = projector.project_back(projector.project(other, 7))
        torch.testing.assert_close(back, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))


@pytest.mark.parametrize(
    ("proj_type", "shape", "expected"),
    [
        ("std", (12, 5), (12, 3)),
        ("std", (5, 12), (3, 12)),
        ("std", (5, 5), (5, 3)),
        ("reverse_std", (12, 5), (3, 5)),
        ("reverse_std", (5, 12), (5, 3)),
        ("right", (5, 12), (5, 3)),
        ("left", (12, 5), (3, 5)),
        ("full", (12, 5), (3, 3)),
        ("std", (8, 4, 3, 3), (3, 36)),
        ("std", (64, 2, 3, 3), (64, 3)),
        ("reverse_std", (8, 4, 5), (8, 3)),
        ("full", (8, 4, 2, 2, 2), (3, 3)),
    ],
)
def test_projected_shape(proj_type, shape, expected):
    projector = GaLoreProjector(3, proj_type=proj_type)
    assert projector.project(torch.randn(shape), 0).shape == expected


@pytest.mark.parametrize("proj_type", PROJ_TYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 4, 100])
def test_bases_are_orthonormal_and_a_rank_beyond_the_matrix_is_clipped(proj_type, shape, rank):
    projector = GaLoreProjector(rank, proj_type=proj_type)
    projector.project(torch.randn(shape), 0)
    clipped = min(rank, shape[0], math.prod(shape[1:]))
    for basis in bases(projector):
        vectors = basis if basis.shape[0] == clipped and basis.shape[1] >= clipped else basis.t()
        assert vectors.shape[0] == clipped and basis.dtype == torch.float32
        torch.testing.assert_close(vectors @ vectors.t(), torch.eye(clipped), rtol=0, atol=1e-5)


@settings(max_examples=40)
@given(
    shape=st.lists(st.integers(1, 9), min_size=2, max_size=5),
    rank=st.integers(1, 12),
    proj_type=st.sampled_from(PROJ_TYPES),
    seed=st.integers(0, 99),
)
def test_projecting_twice_is_projecting_once(shape, rank, proj_type, seed):
    torch.manual_seed(seed)
    projector = GaLoreProjector(rank, proj_type=proj_type)
    projector.project(torch.randn(shape), 0)
    once = projector.project_back(projector.project(torch.randn(shape), 1))
    twice = projector.project_back(projector.project(once, 2))
    assert list(once.shape) == shape
    torch.testing.assert_close(twice, once, rtol=1e-4, atol=1e-5)


def test_scale_is_a_factor_on_what_is_projected_back():
    grad = torch.randn(6, 8)
    plain, scaled = GaLoreProjector(2), GaLoreProjector(2, scale=0.25)
    low_rank = plain.project(grad, 0)
    torch.testing.assert_close(scaled.project(grad, 0), low_rank)
    torch.testing.assert_close(scaled.project_back(low_rank), 0.25 * plain.project_back(low_rank))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("proj_type", PROJ_TYPES)
def test_results_have_the_dtype_of_the_gradient(dtype, proj_type):
    grad = of_rank((16, 10), 2, dtype)
    projector = GaLoreProjector(2, proj_type=proj_type)
    low_rank = projector.project(grad, 0)
    back = projector.project_back(low_rank)
    assert low_rank.dtype == back.dtype == dtype
    eps = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    torch.testing.assert_close(back, grad, rtol=0, atol=10 * eps * float(grad.abs().max()))


def test_bases_are_computed_anew_when_the_iteration_is_a_multiple_of_the_gap():
    projector = GaLoreProjector(2, update_proj_gap=5)
    seen = []
    for iteration in range(3, 12):
        projector.project(torch.randn(6, 8), iteration)
        seen.append(projector.ortho_matrix)
    changes = [i for i in range(4, 12) if not torch.equal(seen[i - 3], seen[i - 4])]
    assert changes == [5, 10]


def test_there_is_no_basis_before_the_first_gradient():
    projector = GaLoreProjector(2)
    assert projector.ortho_matrix is None
    with pytest.raises(RuntimeError, match="call project first"):
        projector.project_back(torch.randn(2, 8))


@pytest.mark.parametrize("type", ["left", "right"])
def test_orthogonal_matrix_holds_the_leading_singular_vectors(type):
    weights = torch.randn(6, 4, 3)
    left, _, right = torch.linalg.svd(weights.double().flatten(1), full_matrices=False)
    expected = left[:, :3] if type == "left" else right[:3]
    actual = GaLoreProjector(3).get_orthogonal_matrix(weights, 3, type)
    both = GaLoreProjector(3).get_orthogonal_matrix(weights, 3, "full")
    assert torch.equal(both[0] if type == "left" else both[1], actual)
    torch.testing.assert_close(actual.double().abs(), expected.abs(), rtol=1e-4, atol=1e-5)
    # It holds no more memory than that.
    assert actual.untyped_storage().nbytes() == actual.nbytes


@pytest.mark.parametrize("flip", [1.0, -1.0])
def test_signs_of_the_vectors_are_fixed(flip):
    grad = torch.randn(9, 7)
    left, right = GaLoreProjector(4).get_orthogonal_matrix(flip * grad, 4, "full")
    for vectors in (left.t(), right):
        assert bool((vectors.gather(1, vectors.abs().argmax(1, keepdim=True)) > 0).all())


def test_equal_gradients_give_equal_bases():
    grad = torch.randn(9, 7)
    first, second = GaLoreProjector(4), GaLoreProjector(4)
    assert torch.equal(first.project(grad, 0), second.project(grad.clone(), 0))


def test_a_zero_gradient_is_projected_to_zero(caplog):
    projector = GaLoreProjector(2, verbose=True)
    with caplog.at_level(logging.INFO):
        low_rank = projector.project(torch.zeros(4, 6), 0)
    assert not low_rank.any() and not projector.project_back(low_rank).any()


def test_a_copy_and_a_loaded_state_go_on_as_the_original(tmp_path):
    for proj_type in PROJ_TYPES:
        projector = GaLoreProjector(2, proj_type=proj_type, scale=0.5)
        projector.project(torch.randn(6, 3, 3), 0)
        torch.save(projector.state_dict(), tmp_path / "state")
        loaded = GaLoreProjector(2, proj_type=proj_type, scale=0.5)
        loaded.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
        grad = torch.randn(6, 3, 3)
        expected = projector.project(grad, 1)
        for other in (copy.deepcopy(projector), loaded):
            assert torch.equal(other.project(grad, 1), expected)
            assert torch.equal(other.project_back(expected), projector.project_back(expected))


def test_state_of_a_projector_without_a_basis_can_be_loaded():
    projector = GaLoreProjector(2)
    projector.project(torch.randn(4, 6), 0)
    projector.load_state_dict(GaLoreProjector(2).state_dict())
    assert projector.ortho_matrix is None


def test_verbose_logs_each_new_basis_and_nothing_is_printed(caplog, capsys):
    projector = GaLoreProjector(2, verbose=True, update_proj_gap=2)
    with caplog.at_level(logging.INFO):
        for iteration in range(3):
            projector.project(of_rank((6, 8), 2), iteration)
    assert [record.getMessage() for record in caplog.records] == [
        "(6, 8) -> (2, 8) keeps 100.0 % of the squared norm"
    ] * 2
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"rank": 4, "update_proj_gap": 0}, "update_proj_gap must be at least 1, got 0"),
        ({"rank": 4, "proj_type": "both"}, "proj_type must be one of std, .*, got 'both'"),
    ],
)
def test_settings_that_make_no_sense_raise(settings, message):
    with pytest.raises(ValueError, match=message):
        GaLoreProjector(**settings)


@pytest.mark.parametrize("shape", [(), (8,), (0, 8), (8, 0, 3)])
def test_gradients_that_are_no_matrix_raise(shape):
    with pytest.raises(ValueError, match="2 or more dimensions, none empty"):
        GaLoreProjector(2).project(torch.randn(shape), 0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
def test_a_gradient_without_a_basis_raises_and_changes_nothing(value):
    projector = GaLoreProjector(2)
    projector.project(torch.randn(4, 6, dtype=torch.double), 0)
    basis = projector.ortho_matrix.clone()
    with pytest.raises(ValueError, match="NaN or Inf"):
        projector.project(torch.full((3, 2), value, dtype=torch.double), 200)
    assert torch.equal(projector.ortho_matrix, basis)
    assert projector.project_back(torch.randn(2, 6)).shape == (4, 6)


def test_gradients_of_another_shape_raise():
    projector = GaLoreProjector(2)
    projector.project(torch.randn(4, 6), 0)
    with pytest.raises(ValueError, match=r"gradients of shape \(4, 6\), got \(6, 4\)"):
        projector.project(torch.randn(6, 4), 1)
    with pytest.raises(ValueError, match=r"projected gradient is 2 x 6, got shape \(4, 6\)"):
        projector.project_back(torch.randn(4, 6))


def test_unknown_type_of_orthogonal_matrix_raises():
    with pytest.raises(ValueError, match="type must be left, right or full, got 'std'"):
        GaLoreProjector(2).get_orthogonal_matrix(torch.randn(3, 3), 2, "std")
