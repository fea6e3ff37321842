"""A tour in one file: features, inversion, attribution, a sweep and its report.

    python docs/tour.py                          SmolLM2-135M, fetched once
    python docs/tour.py --model gpt2 --depth 4   another model

It ends with the path of a page to open in a browser. The tests run it on a tiny model.
"""

import argparse
from pathlib import Path

from lightning_inversion.__main__ import main as run
from lightning_inversion.attribution import attribute
from lightning_inversion.transformer import TransformerSpec

TEXT = "The sky is blue or red depending on the time of day."


def main() -> None:
    """Go through the stations."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=TransformerSpec.model)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("lightning_logs/tour"))
    options = parser.parse_args()

    print("1. What the first blocks make of a text")
    transformer = TransformerSpec(model=options.model, depth=options.depth).load()
    ids = transformer.tokenizer(TEXT, return_tensors="pt").input_ids
    features = transformer.features_of(ids)
    print(f"   {ids.shape[1]} tokens -> features {list(features.shape)}")

    print("2. The text read back from these features alone")
    here = [f"--model.transformer.model={options.model}", f"--data.prompts=[{TEXT!r}]"]
    here += [f"--trainer.default_root_dir={options.out}", "--decoding.show=false"]
    run(["fit", *here, f"--model.transformer.depth={options.depth}"])

    print("3. What the next token rests on")
    model, tokenizer = TransformerSpec(model=options.model).load_causal_lm()
    page = options.out / "attribution.html"
    page.write_text(attribute(model, tokenizer, TEXT).to_html(), encoding="utf-8")
    print(f"   {page}")

    print("4. By depth and by method")
    depths = ",".join(map(str, sorted({1, options.depth})))
    over = [f"--over=transformer.depth={depths}", "--over=token_by_token.every=0,5"]
    run(["sweep", *here, *over, "--model.iterations=60", "--name=by_depth"])

    print("5. All of it on one page")
    run(["report", str(options.out / "lightning_logs"), "--out", str(options.out / "report")])


if __name__ == "__main__":
    main()
