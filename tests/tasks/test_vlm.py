"""Vision-language models: layouts, labels of answers alone, SentSim, training and loading."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from peft import PeftModel
from PIL import Image

from cntlora_core.tasks.answers import IGNORED, prompts_of
from cntlora_core.tasks.chat import (
    LLAVA_TEMPLATE,
    Chat,
    Conversation,
    Pair,
    SentenceEncoder,
    load_chat,
)
from cntlora_core.tasks.presets import VLM
from cntlora_core.tasks.recipes import VlmSettings
from cntlora_core.tasks.settings import planned
from cntlora_core.tasks.vlm import (
    held_out,
    read_instructions,
    read_myvlm,
    read_products,
    train_vlm,
    vlm_task,
)

from .conftest import SHAPE, make_tokenizer

WORDS = (
    "<image>",
    "USER",
    "ASSISTANT",
    ":",
    "Provide",
    "personalized",
    "description",
    "of",
    "image",
)


@pytest.fixture(scope="module")
def llava(tmp_path_factory) -> Path:
    """A LLaVA of 28 pixels, 4 tokens an image, with its processor, as a folder."""
    folder = tmp_path_factory.mktemp("llava")
    tokenizer = make_tokenizer(*WORDS, extra_special_tokens={"image_token": "<image>"})
    vision = transformers.CLIPVisionConfig(image_size=28, patch_size=14, **SHAPE)
    text = transformers.LlamaConfig(
        vocab_size=len(tokenizer), max_position_embeddings=96, initializer_range=0.2, **SHAPE,
        bos_token_id=0, pad_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    config = transformers.LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
    )
    transformers.LlavaForConditionalGeneration(config).save_pretrained(str(folder))
    pillow = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)
    transformers.LlavaProcessor(
        image_processor=pillow(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA_TEMPLATE,
    ).save_pretrained(str(folder))
    return folder


@pytest.fixture
def myvlm(tmp_path: Path) -> Path:
    """Two concepts in myVLM's layout."""
    root = tmp_path / "myvlm"
    for concept, colour in (("my cat", (200, 90, 20)), ("my dog", (20, 20, 160))):
        folder = root / concept
        folder.mkdir(parents=True)
        captions = {}
        for i in range(3):
            Image.new("RGB", (30 + i, 28), colour).save(folder / f"{i}.jpg")
            captions[f"{i}.jpg"] = [f"a {concept[3:]} on the mat", f"the {concept[3:]} sat"]
        name = "captions_augmented.json" if "cat" in concept else "captions.json"
        (folder / name).write_text(json.dumps(captions))
    return root


def settings(tmp_path: Path, llava: Path, data: Path | None, **more) -> VlmSettings:
    given = {
        "output": str(tmp_path / "run"),
        "model": str(llava),
        "data": None if data is None else str(data),
        "rank": 2,
        "steps": 2,
        "batch_size": 2,
        "held_out": 0.34,
        "max_new_tokens": 4,
        "precision": "float32",
        "base_precision": "float32",
        "device": "cpu",
    }
    return VlmSettings(**{**given, **more})


def test_a_run_on_myvlm_gives_captions_and_an_adapter_for_the_stock_base(
    tmp_path, llava, myvlm, tiny_roberta
):
    wanted = settings(tmp_path, llava, myvlm, sentence_encoder=str(tiny_roberta))
    result = train_vlm(wanted)
    assert -1 <= result.metrics["validation"]["sentsim"] <= 1
    written = json.loads((result.folder / "generated-validation.json").read_text())
    assert len(written) == 4  # two images of two captions each
    assert {"a cat on the mat", "the cat sat", "a dog on the mat", "the dog sat"} >= {
        row["expected"] for row in written
    }
    assert written[0]["prompt"].startswith("USER : Provide a personalized description of the image")
    adapted = {name.split(".lora_A")[0] for name, _ in result.model.named_parameters()}
    assert any("vision_tower" in name and name.endswith("q_proj") for name in adapted)
    assert any("language_model" in name and name.endswith("down_proj") for name in adapted)
    batch = load_chat(str(llava))([Conversation(myvlm / "my cat/0.jpg", (("a", "the"),))])
    stock = transformers.AutoModelForImageTextToText.from_pretrained(llava)
    with torch.no_grad():
        expected = result.model.eval()(**batch).logits
        loaded = PeftModel.from_pretrained(stock, result.adapter).eval()
        torch.testing.assert_close(loaded(**batch).logits, expected, rtol=1e-3, atol=1e-4)


def test_labels_are_the_answers_after_the_image(llava, myvlm):
    chat = load_chat(str(llava))
    image = myvlm / "my cat/0.jpg"
    samples = [
        Conversation(image, (("the cat", "a red mat"), ("is it big", "it is not"))),
        Conversation(image, (("the dog ran", "good"),)),
    ]
    batch = chat(samples)
    decode = chat.tokenizer.decode
    found = [decode(row[row != IGNORED]) for row in batch["labels"]]
    assert found == ["a red mat </s> it is not </s>", "good </s>"]
    assert (batch["input_ids"] == chat.tokenizer.convert_tokens_to_ids("<image>")).sum() == 8
    prompts = prompts_of(batch, chat.tokenizer.pad_token_id)
    texts = [decode(row) for row in prompts["input_ids"]]
    assert texts[0].endswith("the cat ASSISTANT :")
    assert texts[1].endswith("the dog ran ASSISTANT :")
    assert prompts["pixel_values"].shape == batch["pixel_values"].shape
    alone = chat([Conversation(None, (("the cat", "a mat"),))])
    assert "pixel_values" not in alone


def test_a_template_may_write_the_tokens_of_an_image_itself(llava, myvlm):
    chat = load_chat(str(llava))
    samples = [Conversation(myvlm / "my cat/0.jpg", (("the cat", "a red mat"),))]
    expected = chat(samples)
    tokenizer = transformers.AutoTokenizer.from_pretrained(llava)
    tokenizer.chat_template = LLAVA_TEMPLATE.replace("<image>", "<image>" * 4)
    found = Chat(Pair(chat.processor.image_processor, tokenizer))(samples)
    for name in ("input_ids", "labels", "attention_mask", "pixel_values"):
        torch.testing.assert_close(torch.as_tensor(found[name]), expected[name])


@pytest.mark.thorough
def test_llama_3_2_vision_answers_after_cross_attention(tmp_path):
    special = ["<|image|>", "<|begin_of_text|>", "<|eot_id|>", "<|h|>"]
    tokenizer = make_tokenizer("user", "assistant", *special, template=False)
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.bos_token = "<|begin_of_text|>"
    template = (
        "{{ bos_token }}{% for m in messages %}<|h|> {{ m['role'] }} <|h|> {% for c in "
        "m['content'] %}{% if c['type'] == 'image' %}<|image|>{% else %}{{ c['text'] }}{% endif %}"
        "{% endfor %}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|h|> assistant <|h|> {% endif %}"
    )
    pillow = getattr(transformers, "MllamaImageProcessorPil", None)
    images = (pillow or transformers.MllamaImageProcessor)(
        size={"height": 28, "width": 28}, max_image_tiles=2
    )
    processor = transformers.MllamaProcessor(images, tokenizer, chat_template=template)
    shape = {"hidden_size": 16, "intermediate_size": 16}
    config = transformers.MllamaConfig(
        vision_config={
            **shape, "num_hidden_layers": 2, "num_global_layers": 1, "attention_heads": 2,
            "vision_output_dim": 32, "image_size": 28, "patch_size": 14, "max_num_tiles": 2,
            "intermediate_layers_indices": [0], "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
        },
        text_config={
            **shape, "vocab_size": len(tokenizer), "num_hidden_layers": 3,
            "cross_attention_layers": [1], "num_attention_heads": 2, "num_key_value_heads": 2,
            "max_position_embeddings": 128, "bos_token_id": 0, "pad_token_id": 1,
            "eos_token_id": 2, "rope_scaling": {"rope_type": "default"},
        },
        image_token_index=tokenizer.convert_tokens_to_ids("<|image|>"),
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.MllamaForConditionalGeneration(config)
    pictures = [Image.new("RGB", (40 + 4 * i, 36), (30 * i, 90, 120)) for i in range(6)]
    conversations = [
        Conversation(picture, (("the cat", "a red mat"), ("is it", "not big"))[: 1 + i % 2])
        for i, picture in enumerate(pictures)
    ]
    wanted = settings(tmp_path, tmp_path, None, preset="llama-3.2-vision", method="cross")
    result = train_vlm(
        wanted,
        model=model,
        processor=processor,
        data={"train": conversations},
        encode=lambda sentences: torch.nn.functional.normalize(torch.ones(len(sentences), 3)),
    )
    assert result.metrics["validation"]["sentsim"] == pytest.approx(1.0)
    written = json.loads((result.folder / "generated-validation.json").read_text())
    assert [row["expected"] for row in written] == ["a red mat"] * 2
    assert any(
        "cross_attn" in name for name in json.loads((result.folder / "ranks.json").read_text())
    )


def test_products_and_instructions_are_read(tmp_path, llava, myvlm):
    datasets = pytest.importorskip("datasets")
    rows = [
        {"image": str(myvlm / f"my cat/{i}.jpg"), "Product Name": "mat", "Category": "red",
         "description": "a red mat"} for i in range(2)
    ]  # fmt: skip
    names = ("Product Name", "Category", "description")
    features = datasets.Features(
        image=datasets.Image(), **{name: datasets.Value("string") for name in names}
    )
    table = datasets.Dataset.from_list(rows, features=features)
    folder = tmp_path / "apd"
    folder.mkdir()
    table.to_parquet(str(folder / "train-00000-of-00001.parquet"))
    (first, _) = read_products(str(folder), "name {product_name}, {category}")["train"]
    assert first.turns == (("name mat, red", "a red mat"),)
    assert first.image.size == (30, 28)
    with pytest.raises(ValueError, match=r"may name {product_name} and {category}, and no others"):
        read_products(str(folder), "a {colour}")
    table.remove_columns("Category").to_parquet(str(folder / "train-00000-of-00001.parquet"))
    with pytest.raises(ValueError, match="no column 'Category'; its columns are image, Product"):
        read_products(str(folder), "")

    said = [
        {"from": "human", "value": "<image>\nthe cat"},
        {"from": "gpt", "value": "a mat"},
        {"from": "human", "value": "is it red"},
        {"from": "gpt", "value": "it is not"},
    ]
    file = tmp_path / "llava_instruct_150k.json"
    file.write_text(json.dumps([{"id": "1", "image": "0.jpg", "conversations": said}]))
    (found,) = read_instructions(str(tmp_path), str(myvlm / "my cat"))
    assert found.turns == (("the cat", "a mat"), ("is it red", "it is not"))
    wanted = settings(tmp_path, llava, tmp_path, preset="qwen2.5-vl", images=str(myvlm / "my cat"))
    with pytest.raises(ValueError, match=r"held_out=0.34 of 1 images leaves none"):
        vlm_task(planned(wanted, VLM["qwen2.5-vl"]), wanted)
    with pytest.raises(FileNotFoundError, match=r"record 0 names the image .*0.jpg"):
        read_instructions(str(file))
    file.write_text(json.dumps([{"id": "1", "conversations": said[1:3]}]))
    with pytest.raises(ValueError, match=r"record 0: .* alternate .* \['gpt', 'human'\]"):
        read_instructions(str(file))


def test_what_is_wrong_with_captions_is_named(tmp_path, llava, myvlm):
    with pytest.raises(FileNotFoundError, match=r"holds no captions.json"):
        read_myvlm(str(tmp_path / "nothing"), "")
    (myvlm / "my dog/2.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"captions.json names the image .*2.jpg"):
        train_vlm(settings(tmp_path, llava, myvlm))
    (myvlm / "my dog/captions.json").write_text('{"1.jpg": [""]}')
    with pytest.raises(ValueError, match=r"a caption of 1.jpg is '', not a sentence"):
        train_vlm(settings(tmp_path, llava, myvlm))
    with pytest.raises(ValueError, match="give data: the preset 'myvlm' reads a local folder"):
        train_vlm(settings(tmp_path, llava, None))


def test_images_that_are_held_out_are_not_trained_on():
    conversations = [Conversation(f"{i // 3}.jpg", (("a", str(i)),)) for i in range(30)]
    found = held_out(conversations, 0.3, seed=1)
    images = {name: {rows[i].image for i in range(len(rows))} for name, rows in found.items()}
    assert len(images["validation"]) == 3
    assert not images["train"] & images["validation"]
    assert held_out(conversations, 0.0, seed=1).keys() == {"train"}


def test_sentences_that_are_the_same_are_as_similar_as_can_be(tiny_roberta):
    encode = SentenceEncoder(str(tiny_roberta))
    features = encode(["the cat sat", "the cat sat", "a big dog ran on the mat"])
    similar = features @ features.T
    torch.testing.assert_close(similar.diagonal(), torch.ones(3))
    assert similar[0, 1] > 0.9999 > similar[0, 2]
    torch.testing.assert_close(encode(["the cat sat"])[0], features[0], rtol=1e-4, atol=1e-5)
