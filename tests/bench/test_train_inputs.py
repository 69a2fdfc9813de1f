"""What training feeds the encoder, against Hugging Face's image processor and the templates of MetaEmbed's release."""

import numpy as np
import pytest

from metaembed.bench import train_inputs
from metaembed.bench.demo_model import write_checkpoint
from metaembed.bench.scenes import Scene, allowed_pairs, sample_scene, split_generator
from metaembed.bench.scenes_queries import Query, ask
from metaembed.bench.scenes_render import render
from metaembed.bench.train_mmr import relevance
from metaembed.bench.train_words import cell_labels, noun_labels

PAIRS = allowed_pairs("train")


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    """Hugging Face's processor, opened from the preprocessor_config.json that the demo ships."""
    models = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    folder = tmp_path_factory.mktemp("processor")
    write_checkpoint(folder, {})
    return models.Qwen2VLImageProcessorPil.from_pretrained(folder)


@pytest.mark.parametrize("varied", [False, True])
def test_patches_equal_hugging_faces(processor, varied):
    rng = split_generator("train", 8)
    for scene in [sample_scene(rng, PAIRS, varied=varied) for _ in range(6)]:
        expected = processor(images=[render(scene)], return_tensors="np")
        assert expected["image_grid_thw"].tolist() == [[1, *train_inputs.scene_grid(scene)]]
        np.testing.assert_allclose(train_inputs.scene_patches(scene), expected["pixel_values"], atol=2e-6)


def decoded(prompt):
    return train_inputs.TOKENIZER.decode(prompt.ids.tolist(), skip_special_tokens=False)


def test_prompts_follow_the_released_templates():
    """Expected strings: the templates that the official code builds with use_simple_prompt."""
    page = Scene(84, 56, 255, ())
    image = "<|im_start|>user\n<|vision_start|>" + "<|image_pad|>" * 6 + "<|vision_end|>"
    end, tail = "<|im_end|><|endoftext|>", "<|endoftext|>" * 10 + "\n"
    expected = {
        Query(frozenset(), "a red sun", None): f"<|im_start|>user\nQuery: a red sun{end}{tail}",
        Query(frozenset(), None, page): f"{image}Query: Describe the image.{end}{tail}",
        Query(frozenset(), "and a red sun", page): f"{image}Query: and a red sun{end}{tail}",
    }
    for query, text in expected.items():
        assert decoded(train_inputs.query_prompt(query)) == text
    assert decoded(train_inputs.candidate_prompt(page)) == f"{image}Describe the image.{end}"


def test_every_item_of_a_page_labels_the_cell_it_stands_in():
    """Counted from the items: each pair labels at least one cell, and no cell has a label of another page."""
    rng = split_generator("train", 9)
    for varied in (False, True):
        scene = sample_scene(rng, PAIRS, varied=varied)
        labels = {tuple(row) for row in cell_labels(scene).tolist()} - {(-1, -1)}
        assert labels == scene.pairs


def test_nouns_are_labelled_with_the_colour_before_them():
    query = ask(np.random.default_rng(0), "text", [(3, 1), (60, 7)])
    labels = noun_labels(train_inputs.query_prompt(query).ids)
    assert [tuple(row) for row in labels[labels[:, 0] >= 0].tolist()] == [(3, 1), (60, 7)]


def test_relevance_is_containment():
    """Expected value: Python's set comparison."""
    rng = split_generator("train", 10)
    scenes = tuple(sample_scene(rng, PAIRS[:40]) for _ in range(9))
    queries = [ask(rng, "text", sorted(scenes[k].pairs)[: 1 + k % 3]) for k in range(5)]
    expected = [[query.pairs <= scene.pairs for scene in scenes] for query in queries]
    assert relevance(queries, scenes).tolist() == expected
