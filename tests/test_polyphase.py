"""Packed operators against the matrices of the plain ones, built by loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import convolution_matrix, transposed_matrix
from hypothesis import given, settings
from hypothesis import strategies as st

from flipad_jax.inversion import linops, polyphase

pytestmark = pytest.mark.usefixtures("strict_ranks")

DTYPES = [(jnp.float32, 1e-5), (jnp.float64, 1e-13)]


def normal(seed, shape, dtype=np.float64):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


geometries = st.fixed_dictionaries(
    {
        "transposed": st.booleans(),
        "size": st.tuples(st.integers(4, 7), st.integers(4, 6)),
        "window": st.tuples(st.integers(1, 4), st.integers(1, 4)),
        "channels": st.tuples(st.integers(1, 3), st.integers(1, 3)),
        "strides": st.tuples(st.integers(1, 3), st.integers(1, 3)),
        "padding": st.tuples(*[st.tuples(st.integers(0, 1), st.integers(0, 1))] * 2),
        "dtype": st.sampled_from(DTYPES),
    }
)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(geometry=geometries, form=st.sampled_from(polyphase.FORMS))
def test_packed_operator_is_the_matrix_built_by_loops(geometry, form):
    (dtype, tol), (c_in, c_out) = geometry["dtype"], geometry["channels"]
    kernel = normal(0, (*geometry["window"], c_in, c_out))
    shape = (*geometry["size"], c_in)
    make, matrix_of = (
        (linops.conv_transpose, transposed_matrix)
        if geometry["transposed"]
        else (linops.conv, convolution_matrix)
    )
    try:
        op = make(
            kernel.astype(dtype), shape, strides=geometry["strides"], padding=geometry["padding"]
        )
    except ValueError:  # Padding cuts all of the result away.
        return
    before = tuple(low for low, _ in geometry["padding"])
    matrix = matrix_of(kernel, shape, geometry["strides"], before, op.output_shape)
    packed = polyphase.polyphase(op, form)
    z, o = normal(1, shape, dtype), normal(2, op.output_shape, dtype)

    def both(packed, z, o):
        az = packed.forward(polyphase.pack_input(packed, z))
        ato = packed.adjoint(polyphase.pack_output(packed, o))
        return az, ato

    az, ato = jax.jit(both)(packed, z, o)
    assert az.shape == packed.output_shape and ato.shape == packed.input_shape
    assert az.dtype == ato.dtype == dtype
    size = np.linalg.norm(matrix)
    error = np.ravel(polyphase.unpack_output(packed, az)) - matrix @ z.ravel().astype(float)
    assert np.linalg.norm(error) <= tol * size * np.linalg.norm(z)
    error = np.ravel(polyphase.unpack_input(packed, ato)) - matrix.T @ o.ravel().astype(float)
    assert np.linalg.norm(error) <= tol * size * np.linalg.norm(o)
    # What packing added stays zero, so that norms are those of the plain maps.
    np.testing.assert_allclose(
        np.linalg.norm(az), np.linalg.norm(polyphase.unpack_output(packed, az)), rtol=1e-6
    )
    np.testing.assert_allclose(
        np.linalg.norm(ato), np.linalg.norm(polyphase.unpack_input(packed, ato)), rtol=1e-6
    )


@pytest.mark.parametrize("form", polyphase.FORMS)
@pytest.mark.parametrize("make", [linops.conv_transpose, linops.conv])
def test_packed_maps_of_any_content_have_an_exact_adjoint(make, form):
    # Stride 2 does not divide 7: the packed maps have entries that no pixel has.
    op = make(normal(0, (3, 3, 2, 3)), (7, 5, 2), strides=2, padding=1)
    packed = polyphase.polyphase(op, form)
    z, o = normal(1, packed.input_shape), normal(2, packed.output_shape)
    az, ato = jax.jit(lambda p, z, o: (p.forward(z), p.adjoint(o)))(packed, z, o)
    np.testing.assert_allclose(np.vdot(az, o), np.vdot(z, ato), rtol=1e-12)


def test_packing_goes_by_phase_and_back():
    op = linops.conv_transpose(normal(0, (4, 4, 2, 3)), (3, 2, 2), strides=(2, 3), padding=0)
    packed = polyphase.polyphase(op)
    images = normal(1, (4, *op.output_shape))
    rows = polyphase.pack_output(packed, jnp.asarray(images))
    assert rows.shape == (4, *packed.output_shape) == (4, 4, 3, 18)
    for a in range(2):
        for b in range(3):
            phase = images[:, a::2, b::3]
            block = rows[..., (3 * a + b) * 3 : (3 * a + b + 1) * 3]
            np.testing.assert_array_equal(block[:, : phase.shape[1], : phase.shape[2]], phase)
    np.testing.assert_array_equal(polyphase.unpack_output(packed, rows), images)
    np.testing.assert_array_equal(polyphase.pack_input(packed, images[..., :2]), images[..., :2])


def test_form_is_products_on_a_cpu_and_another_is_refused():
    op = linops.conv(normal(0, (3, 3, 2, 3)), (5, 5, 2))
    assert polyphase.polyphase(op).form == "products"
    with pytest.raises(ValueError, match="form='fft'.*products.*convolution"):
        polyphase.polyphase(op, "fft")
