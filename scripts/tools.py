"""The tools that a model can be given: list them, or call one by hand.

python scripts/tools.py                                               each tool's schema, one per line
python scripts/tools.py calculator '{"expression": "12 * 30"}'        calls it, as a model would
python eval_model.py --tools calculator,calendar --prompt "…"         lets a model call them
"""

import json

import _repo  # noqa: F401  (lets `python scripts/tools.py` find the packages)

from scripts.tool_use.builtin import registry_of
from scripts.tool_use.registry import ERROR
from trainer.arguments import Parser
from trainer.errors import UserError, run_main


def main():
    parser = Parser(__doc__)
    parser.add_argument("name", nargs="?", help="the tool to call (default: list all)")
    parser.add_argument("arguments", nargs="?", default="{}", help="the tool's arguments, a JSON object")
    args = parser.parse_args()
    tools = registry_of(["all"])
    if args.name is None:
        print("\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools.schemas))
        return
    try:
        arguments = json.loads(args.arguments)
    except (ValueError, RecursionError) as error:
        raise UserError(f"the arguments are not JSON: {error}") from None
    result = tools.call(args.name, arguments)
    if result.startswith(ERROR):
        raise UserError(result.removeprefix(ERROR))
    print(result)


if __name__ == "__main__":
    run_main(main)
