"""Download a model from the Hugging Face Hub: its config, tokenizer and weights, and nothing twice.

    python scripts/download.py --repo_id meta-llama/Llama-3.2-1B

The folder it writes is what `generate.py --checkpoint_path` takes. An interrupted download resumes.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from checkpoint import user_errors

COMPANIONS = ["*.json", "tokenizer.model", "*.jinja", "*.md", "LICENSE*", "USE_POLICY*"]


def download(repo_id: str, output_dir: Path, revision: str | None = None, token: str | None = None) -> None:
    """Fetch the repository's files into `output_dir`: safetensors, or .bin where there are none.

    Raises ValueError that says what to do where the Hub refuses or cannot be reached.
    """
    import httpx
    from huggingface_hub import HfApi, errors

    api = HfApi(token=token)
    try:
        names = api.list_repo_files(repo_id, revision=revision)
        root = [name for name in names if "/" not in name]
        kind = "*.safetensors" if any(name.endswith(".safetensors") for name in root) else "pytorch_model*.bin"
        ignored = ["*/*", "pytorch_model.bin.index.json"] if kind == "*.safetensors" else ["*/*"]
        api.snapshot_download(
            repo_id,
            revision=revision,
            local_dir=output_dir,
            allow_patterns=[*COMPANIONS, kind],
            ignore_patterns=ignored,
        )
    except errors.HFValidationError as error:
        raise ValueError(f"--repo_id {repo_id!r} is not of the form organization/name: {error}") from None
    except errors.GatedRepoError:
        raise ValueError(
            f"{repo_id} is gated: accept its licence on its page of the Hub, then log in (hf auth login) or pass --hf_token"
        ) from None
    except errors.RevisionNotFoundError:
        raise ValueError(f"{repo_id} has no revision {revision!r}") from None
    except errors.RepositoryNotFoundError:
        raise ValueError(
            f"{repo_id} was not found: check the spelling, or log in (hf auth login) if it is private"
        ) from None
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, httpx.HTTPError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{repo_id} could not be downloaded ({reason}); check the network and run the same command again"
        ) from None
    print(f"wrote {output_dir}", file=sys.stderr)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repo_id", required=True, help="organization/name on the Hub")
    parser.add_argument("--output_dir", type=Path, help="default: checkpoints/REPO_ID")
    parser.add_argument("--revision", help="a branch, tag or commit; default: main")
    parser.add_argument("--hf_token", help="access token for gated models; default: the one `hf auth login` stored")
    args = parser.parse_args(argv)
    with user_errors():
        download(args.repo_id, args.output_dir or Path("checkpoints") / args.repo_id, args.revision, args.hf_token)


if __name__ == "__main__":
    main()
