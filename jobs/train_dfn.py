"""winnow dfn train: clean pairs -> a data filtering network, a run directory that `clip_score` takes as its model.

The work is in stage_networks.py; what a network may say is in recipes.py and training/config.py.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace

from jobs.arguments import add_eval_data, add_recipe, job, make_parser, split_words
from jobs.recipes import Network, load_recipe
from pipeline.errors import ConfigError, check_name

EXAMPLE = """  winnow dfn train dfn-tiny --clean pools/cifar-hq --out networks/dfn
  winnow dfn train my.yaml --network dfn --clean clean-pairs --out networks/dfn networks.dfn.train.samples=1280000
  winnow dfn train my.yaml --clean clean-pairs --out networks/dfn --sweep 0,0.25,0.5,0.75,1"""


@job
def main(argv: Sequence[str] | None = None) -> None:
    """Parse, train the network, print where it is."""
    parser = make_parser("dfn train", "Train a recipe's filter network on clean pairs.", EXAMPLE)
    add_recipe(parser)
    parser.add_argument("--clean", required=True, help="high-quality pairs: pool or shards")
    parser.add_argument("--out", required=True, help="network folder")
    parser.add_argument("--network", default="dfn", help="which of the recipe's networks (default: dfn)")
    parser.add_argument("--sweep", metavar="A,B,...", help="shares of the fine-tuned weights, a checkpoint for each")
    add_eval_data(parser)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    args = parser.parse_args(argv)
    recipe = load_recipe(*split_words(args.words))
    if not recipe.networks:
        raise ConfigError(f"recipe {recipe.name!r} has no networks to train.")
    check_name(args.network, recipe.networks, kind="network")
    network = recipe.networks[args.network]
    if args.sweep:
        network = add_sweep(network, args.sweep)
    from jobs.stage_networks import format_sweep, run_network

    manifest = run_network(network, data=args.clean, out=args.out, eval_data=args.eval_data, device=args.device)
    if table := format_sweep(manifest):
        print(table)
    if network.finetune:
        print(f"weights: {manifest.facts['finetuned_share']:g} of the fine-tuned, the rest of the pretrained")
    else:
        print(f"final loss {manifest.facts['final_loss']:.4f}")
    print(f"score a pool with {{filter: clip_score, model: {args.out}}}")


def add_sweep(network: Network, shares: str) -> Network:
    """Return the network with a sweep over comma-separated shares.  Raises ConfigError for one without fine-tuning."""
    if network.finetune is None:
        raise ConfigError("--sweep mixes weights before and after fine-tuning, but the network has no finetune block.")
    try:
        values = [float(share) for share in shares.split(",")]
    except ValueError:
        raise ConfigError(f"--sweep {shares!r} should be numbers with commas, such as 0,0.5,1.") from None
    return replace(network, finetune=replace(network.finetune, sweep=values))


if __name__ == "__main__":
    sys.exit(main())
