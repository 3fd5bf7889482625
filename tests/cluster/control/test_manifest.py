from __future__ import annotations

from cluster.control.manifest import Manifest, Mismatch, weights_name


def test_what_differs_is_named_and_what_is_new_is_not() -> None:
    manifest = Manifest({1: {0: 10, 1: 11}})
    assert manifest.mismatches({1: {0: 10, 5: 15}, 2: {0: 7}}) == []
    [wrong] = manifest.mismatches({1: {1: 12, 0: 10}})
    assert wrong == Mismatch(1, 1, known=11, seen=12)
    assert str(wrong) == (
        "Expert 1 of layer 1 has the checksum 000000000000000c, but the manifest says 000000000000000b: "
        "it must not be served."
    )


def test_another_dtype_has_other_bytes() -> None:
    assert weights_name("abc", "float32") != weights_name("abc", "bfloat16")
