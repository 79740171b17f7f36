"""RACE attention in models of Hugging Face transformers, built from configurations: training,
generation, conversion.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed; only its adapter needs it")
transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed; only its adapter needs it"
)

import racecore.adapters.transformers as race
from racecore.adapters.torch import race_attention

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
race.register()


@pytest.fixture(autouse=True)
def one_thread():
    """Models of a few thousand numbers: PyTorch's threads would mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def model_with(attention, seed=0, **options):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(**SIZES, attn_implementation=attention, **options)
    return transformers.LlamaForCausalLM(config).eval()


def tokens(batch=2, n=20, seed=0):
    return torch.randint(2, 50, (batch, n), generator=torch.Generator().manual_seed(seed))


def padded(batch=2, n=20):
    mask = torch.ones(batch, n, dtype=torch.long)
    mask[0, :6] = 0
    return mask


def generated(model, mask, **options):
    torch.manual_seed(3)
    ids = tokens(*mask.shape)
    return model.generate(ids, attention_mask=mask, max_new_tokens=12, **options)


def test_a_model_from_a_configuration_trains():
    model = model_with("race").train()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    ids, losses = tokens(4, 40), []
    for _ in range(15):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("convert", [None, [1]], ids=["all layers", "one layer"])
@pytest.mark.parametrize(
    "mask", [torch.ones(2, 20, dtype=torch.long), padded()], ids=["full", "padded"]
)
@pytest.mark.parametrize(
    "options", [{}, {"do_sample": True}, {"num_beams": 3}], ids=["greedy", "sampling", "beams"]
)
def test_step_by_step_gives_the_tokens_of_full_recomputation(convert, mask, options):
    model = model_with("race" if convert is None else "sdpa")
    if convert is not None:
        race.convert(model, convert)
    recomputed = generated(model, mask, use_cache=False, **options)
    assert len(set(recomputed[0, 20:].tolist())) > 2
    cache = race.new_cache(model)
    np.testing.assert_array_equal(generated(model, mask, cache=cache, **options), recomputed)
    np.testing.assert_array_equal(
        generated(model, mask, **options), recomputed
    )  # transformers' own cache of all keys
    assert cache.get_seq_length() == 31


def test_the_cache_does_not_grow():
    model, sizes = model_with("race"), []
    for n in (5, 50):
        cache = race.new_cache(model)
        with torch.no_grad():
            model(input_ids=tokens(1, n), cache=cache)
        sizes.append([layer.race.nbytes for layer in cache.layers])
    assert sizes[0] == sizes[1] == [8 * 2 * 64 * (1 + 8)] * 3


def test_a_copied_cache_goes_back():
    model, cache = model_with("race"), None
    with torch.no_grad():
        cache = race.new_cache(model)
        model(input_ids=tokens(2, 10), cache=cache)
        kept = copy.deepcopy(cache)
        first = model(input_ids=tokens(2, 5, seed=1), cache=cache).logits
        again = model(input_ids=tokens(2, 5, seed=1), cache=kept).logits
        np.testing.assert_array_equal(first, again)
        with pytest.raises(NotImplementedError, match="taken out"):
            cache.crop(-2)
        cache.reset()
        assert cache.get_seq_length() == 0
        np.testing.assert_array_equal(
            model(input_ids=tokens(2, 10), cache=cache).logits,
            model(input_ids=tokens(2, 10)).logits,
        )


def test_a_layer_attends_as_race_attention_does():
    model = model_with("sdpa")
    assert race.convert(model, readout="bucket_mean", n_tables=3, n_planes=2, beta=2.0, rng=7) == [
        0,
        1,
        2,
    ]
    seen = {}
    attention = model.model.layers[1].self_attn
    attention.register_forward_hook(
        lambda module, given, options, out: seen.update(x=options["hidden_states"], out=out[0]),
        with_kwargs=True,
    )
    embeddings = {}
    model.model.rotary_emb.register_forward_hook(
        lambda module, given, out: embeddings.update(cos=out[0], sin=out[1])
    )
    with torch.no_grad():
        model(input_ids=tokens())
        x = seen["x"]
        q, k, v = (
            p(x).view(2, 20, -1, 8) for p in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        apply = transformers.models.llama.modeling_llama.apply_rotary_pos_emb
        q, k = apply(q, k, embeddings["cos"], embeddings["sin"], unsqueeze_dim=2)
        expected = race_attention(
            q,
            k,
            v,
            attention.race.planes,
            attention.race.beta,
            is_causal=True,
            readout="bucket_mean",
        )
        torch.testing.assert_close(
            seen["out"], attention.o_proj(expected.reshape(2, 20, 32)), rtol=1e-5, atol=1e-6
        )
    planes = [layer.self_attn.race.planes for layer in model.model.layers]
    assert not torch.equal(planes[0], planes[1])


def test_converted_layers_learn_and_are_in_the_state_dict():
    model = model_with("sdpa")
    race.convert(model, [0, 2], learn_planes=True)
    ids = tokens()
    model(input_ids=ids, labels=ids).loss.backward()
    names = [
        name for name, p in model.named_parameters() if ".race." in name and p.grad.abs().sum() > 0
    ]
    assert names == [
        f"model.layers.{i}.self_attn.race.{name}" for i in (0, 2) for name in ("planes", "beta")
    ]
    other = model_with("sdpa", seed=1)
    race.convert(other, [0, 2], rng=5)
    other.load_state_dict(model.state_dict())
    np.testing.assert_array_equal(
        *(m(input_ids=ids).logits.detach().numpy() for m in (model, other))
    )
    assert (
        model_with("sdpa").config._attn_implementation
        == model.config._attn_implementation
        == "sdpa"
    )


def test_masks_of_other_layers_are_understood(monkeypatch):
    """In a model of which some layers are converted, masks come as sdpa and eager attention want
    them.
    """
    results = []
    for implementation in ("sdpa", "eager"):
        model = model_with(implementation)
        race.convert(model, [0, 1, 2], learn_beta=False)
        with torch.no_grad():
            results.append(model(input_ids=tokens(), attention_mask=padded()).logits[:, -1])
    torch.testing.assert_close(*results)
    whole = model_with("race")
    race.convert(whole)
    with torch.no_grad():
        torch.testing.assert_close(
            whole(input_ids=tokens(), attention_mask=padded()).logits[:, -1], results[0]
        )


def test_bidirectional_models():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        attn_implementation="race",
        attention_probs_dropout_prob=0.0,
        hidden_dropout_prob=0.0,
    )
    model = transformers.BertModel(config).eval()
    ids, mask = tokens(), padded()
    with torch.no_grad():
        whole = model(input_ids=ids).last_hidden_state
        later = ids.clone()
        later[:, -1] = (later[:, -1] + 1) % 50
        assert not torch.equal(model(input_ids=later).last_hidden_state[:, 0], whole[:, 0])
        hidden = ids.clone()
        hidden[0, :6] = 3  # under the mask
        np.testing.assert_array_equal(
            model(input_ids=ids, attention_mask=mask).last_hidden_state[0, 6:],
            model(input_ids=hidden, attention_mask=mask).last_hidden_state[0, 6:],
        )


def test_converting_leaves_others_alone():
    ids = tokens()
    race.register("race of my own", n_tables=8, rng=5)
    race.register(n_tables=3, rng=5)
    try:
        model = model_with("race")
        with torch.no_grad():
            before = model(input_ids=ids).logits
            race.convert(model_with("sdpa"))
            np.testing.assert_array_equal(model(input_ids=ids).logits, before)
    finally:
        race.register()


def test_the_first_call_leaves_no_traces():
    """The fixed hash is made by the first call, which may be under inference mode."""
    race.register("race once more")
    model = model_with("race once more")
    with torch.inference_mode():
        model(input_ids=tokens())
    model.train()(input_ids=tokens(), labels=tokens()).loss.backward()


def test_packed_sequences():
    model, ids = model_with("race"), tokens(1, 20)
    bounds = torch.tensor([0, 8, 20], dtype=torch.int32)
    positions = torch.cat([torch.arange(8), torch.arange(12)])[None]
    with torch.no_grad():
        packed = model(
            input_ids=ids, position_ids=positions, cu_seq_lens_q=bounds, cu_seq_lens_k=bounds
        ).logits
        torch.testing.assert_close(
            packed[:, 8:], model(input_ids=ids[:, 8:]).logits, rtol=1e-4, atol=1e-5
        )


def test_autocast_while_generating():
    model = model_with("race")
    with torch.autocast("cpu", torch.bfloat16):
        generated(model, padded(), cache=race.new_cache(model))


def mistral():
    config = transformers.MistralConfig(**SIZES, sliding_window=8, attn_implementation="sdpa")
    return transformers.MistralForCausalLM(config).eval()


def bart():
    config = transformers.BartConfig(
        vocab_size=50,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        attn_implementation="sdpa",
    )
    return transformers.BartForConditionalGeneration(config)


@pytest.mark.parametrize(
    "make", [lambda: model_with("race"), lambda: model_with("sdpa")], ids=["race", "converted"]
)
def test_static_caches_are_refused(make):
    model = make()
    if model.config._attn_implementation == "sdpa":
        race.convert(model)
    cache = transformers.StaticCache(config=model.config, max_cache_len=64)
    with torch.no_grad(), pytest.raises(ValueError, match="static cache"):
        model(input_ids=tokens(), cache=cache)


def test_models_that_are_refused():
    model = mistral()
    race.convert(model)
    with pytest.raises(ValueError, match="no sliding window"):
        model.generate(tokens(2, 4), max_new_tokens=12, cache=race.new_cache(model))
    with pytest.raises(ValueError, match="encoder and a decoder"):
        race.convert(bart())
    with pytest.raises(ValueError, match="already"):
        race.convert(model)


def test_refusals():
    with pytest.raises(ValueError, match="attention_dropout must be 0"):
        model_with("race", attention_dropout=0.1).train()(input_ids=tokens())
    with pytest.raises(ValueError, match="causal and padding masks only"):
        mask = torch.ones(2, 1, 20, 20, dtype=torch.bool).tril()
        mask[:, :, 10:, 3] = False
        model_with("race")(input_ids=tokens(), attention_mask=mask)
    with pytest.raises(ValueError, match="causal and padding masks only"):
        positions = torch.arange(10).repeat(2)[None]
        model_with("race")(input_ids=tokens(1), position_ids=positions, use_cache=False)
    with pytest.raises(ValueError, match="attention layers"):
        race.convert(model_with("sdpa"), [7])
    with pytest.raises(ValueError, match="attention layers"):
        race.convert(torch.nn.Linear(2, 2))
    model = model_with("sdpa")
    cache = race.new_cache(model)
    race.convert(model)
    wrong = race.new_cache(model)
    with torch.no_grad():
        model = model_with("sdpa")
        model(input_ids=tokens(), cache=wrong)
        with pytest.raises(RuntimeError, match="does not know the past"):
            model(input_ids=tokens(), cache=wrong)
    assert type(cache.layers[0]) is transformers.cache_utils.DynamicLayer
