"""Gram matrices of domain vectors against NumPy in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from namex_hf.bargaining import cosine, domain_gram, gram_of


def experts_and_base(count: int, *shape: int, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    experts = torch.randn(count, *shape, generator=generator, dtype=torch.float64).to(dtype)
    return experts, torch.randn(*shape, generator=generator, dtype=torch.float64).to(torch.float32)


def reference(experts: torch.Tensor, base: torch.Tensor) -> np.ndarray:
    tau = (experts.double() - base.double()).flatten(1).numpy()
    return tau @ tau.T


@pytest.mark.parametrize("count", [1, 2, 7, 16, 17, 33, 60])
@pytest.mark.parametrize("chunk_bytes", [1, 1000, 2**22])
def test_equals_numpy(count: int, chunk_bytes: int) -> None:
    experts, base = experts_and_base(count, 13, 29)
    gram = domain_gram(experts, base, chunk_bytes=chunk_bytes)
    assert gram.dtype == torch.float64
    assert torch.equal(gram, gram.T)
    expected = reference(experts, base)
    np.testing.assert_allclose(gram.numpy(), expected, rtol=0, atol=1e-6 * expected.diagonal().max())


def test_double_is_not_rounded_to_single() -> None:
    experts, base = experts_and_base(9, 500, dtype=torch.float64)
    base = base.double() + 1e-12
    gram = domain_gram(experts, base)
    np.testing.assert_allclose(gram.numpy(), reference(experts, base), rtol=0, atol=1e-11)


def test_the_base_is_not_rounded_to_the_dtype_of_the_experts() -> None:
    experts = torch.ones(2, 64, dtype=torch.bfloat16)
    base = torch.full((64,), 1 + 1e-3)  # bfloat16 would make it 1, and both domain vectors 0.
    np.testing.assert_allclose(domain_gram(experts, base).numpy(), np.full((2, 2), 64e-6), rtol=1e-3)


def test_chunks_are_summed_in_double() -> None:
    # 2^24 + 1 has no float32: summed in single precision, the ones behind the large entry would be lost.
    vector = torch.ones(1, 5)
    vector[0, 0] = 2.0**12
    assert gram_of(vector, chunk_bytes=4).item() == 2.0**24 + 4


def test_an_expert_taken_as_base_has_a_row_of_exact_zeros() -> None:
    experts, _ = experts_and_base(5, 40, 3)
    gram = domain_gram(experts, experts[2])
    assert torch.equal(gram[2], torch.zeros(5, dtype=torch.float64))
    assert gram.diagonal().count_nonzero() == 4


def test_list_of_tensors_slices_and_transposes_give_the_same() -> None:
    experts, base = experts_and_base(6, 10, 12)
    whole = domain_gram(experts, base, chunk_bytes=700)
    assert torch.equal(domain_gram(list(experts), base, chunk_bytes=700), whole)
    fused = torch.cat([experts, torch.zeros_like(experts)], dim=1)
    assert torch.equal(domain_gram(fused[:, :10], base, chunk_bytes=700), whole)
    turned = experts.mT.contiguous().mT
    assert torch.equal(domain_gram(turned, base, chunk_bytes=700), whole)


def test_grams_of_parts_add_up() -> None:
    experts, base = experts_and_base(6, 10, 12, dtype=torch.float64)
    parts = domain_gram(experts[:, :4], base[:4]) + domain_gram(experts[:, 4:], base[4:])
    torch.testing.assert_close(parts, domain_gram(experts, base), rtol=1e-13, atol=1e-13)


def test_no_gradient_and_inputs_untouched() -> None:
    experts, base = experts_and_base(3, 20, dtype=torch.float32)
    before = experts.clone(), base.clone()
    gram = domain_gram(experts.requires_grad_(), base.requires_grad_())
    assert not gram.requires_grad
    assert torch.equal(experts, before[0])
    assert torch.equal(base, before[1])


def test_never_a_float_copy_of_the_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    allocate = torch.empty

    def watched(*shape: int, **options: object) -> torch.Tensor:
        sizes.append(int(np.prod(shape)))
        return allocate(*shape, **options)  # type: ignore[call-overload, no-any-return]

    monkeypatch.setattr(torch, "empty", watched)
    experts, base = experts_and_base(8, 4096)
    domain_gram(experts, base, chunk_bytes=4096)
    assert max(sizes) == 4096 // 4


def test_cosine() -> None:
    vectors = torch.tensor([[3.0, 0.0], [1e-6, 1e-6], [0.0, 0.0], [-2e6, 0.0]], dtype=torch.float64)
    half = 0.5**0.5
    expected = torch.tensor(
        [[1, half, 0, -1], [half, 1, 0, -half], [0, 0, 0, 0], [-1, -half, 0, 1]], dtype=torch.float64
    )
    torch.testing.assert_close(cosine(gram_of(vectors)), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(cosine(gram_of(vectors)[None].float())[0], expected.float(), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("experts", "base", "message"),
    [
        (torch.zeros(3), torch.zeros(()), "N, D"),
        (torch.zeros(0, 3), torch.zeros(3), "no experts"),
        (torch.zeros(2, 3), torch.zeros(4), r"\[3\].*\[4\]"),
        ([torch.zeros(3), torch.zeros(2)], torch.zeros(3), "expert 1"),
        (torch.zeros(2, 3, dtype=torch.int64), torch.zeros(3), "int64"),
    ],
)
def test_refuses(experts: torch.Tensor, base: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        domain_gram(experts, base)


def test_refuses_an_empty_chunk() -> None:
    with pytest.raises(ValueError, match="chunk_bytes"):
        domain_gram(torch.zeros(2, 3), torch.zeros(3), chunk_bytes=0)
