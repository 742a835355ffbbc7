"""winnow dfn train: clean pairs -> a data filtering network, a run directory that `clip_score` takes as its model."""

import sys
from collections.abc import Sequence

from jobs.arguments import add_recipe, job, make_parser, split_words
from jobs.recipes import load_recipe
from pipeline.errors import ConfigError, check_name
from training.run import train

EXAMPLE = """  winnow dfn train dfn-tiny --clean pools/cifar-hq --out networks/dfn
  winnow dfn train my.yaml --network dfn --clean clean-pairs --out networks/dfn networks.dfn.train.samples=1280000"""


@job
def main(argv: Sequence[str] | None = None) -> None:
    """Parse, train the network, print where it is."""
    parser = make_parser("dfn train", "Train a recipe's filter network on clean pairs.", EXAMPLE)
    add_recipe(parser)
    parser.add_argument("--clean", required=True, help="high-quality pairs: pool or shards")
    parser.add_argument("--out", required=True, help="network folder")
    parser.add_argument("--network", default="dfn", help="which of the recipe's networks (default: dfn)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    args = parser.parse_args(argv)
    recipe = load_recipe(*split_words(args.words))
    if not recipe.networks:
        raise ConfigError(f"recipe {recipe.name!r} has no networks to train.")
    check_name(args.network, recipe.networks, kind="network")
    config = recipe.networks[args.network].train
    facts = train(config, data=args.clean, out=args.out, device=args.device).facts
    print(f"final loss {facts['final_loss']:.4f}; score a pool with {{filter: clip_score, model: {args.out}}}")


if __name__ == "__main__":
    sys.exit(main())
