"""The `coterie` command: one short function for each stage.

Stages are imported inside their functions, so that `coterie --help` does not wait for torch.
"""

import sys
import warnings
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from coterie.errors import CoterieError, CoterieWarning
from coterie_cli.bundle import bundle_app, push_bundle
from coterie_cli.evaluate import evaluate
from coterie_cli.gallery import gallery_app
from coterie_cli.keys import KeyFile, key_app
from coterie_cli.options import FORMS, BundlePath, Data, Device, Group, Strict, Threads, console, show_rejected
from coterie_cli.sweep import sweep

app = typer.Typer(
    name="coterie",
    help="Train image encoders, package them as verified bundles, serve embeddings and open-set labels.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(bundle_app, name="bundle")
app.add_typer(gallery_app, name="gallery")
app.add_typer(key_app, name="key")

# What only an extra brings, and serving does without.
EXTRAS = dict.fromkeys(
    ("torch", "torchvision", "timm", "onnx", "safetensors", "pytorch_metric_learning", "yaml"), "train"
) | {"plotly": "report"}

Port = Annotated[int, typer.Option(help="Port to listen on.", min=1, max=65535)]


def main() -> None:
    """Run the command line; errors of the user's making are one line on stderr."""
    warnings.showwarning = _show_warning
    try:
        app()
    except CoterieError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except ModuleNotFoundError as error:
        extra = EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        print(f"error: this command needs {error.name}, which is not here: install coterie[{extra}]", file=sys.stderr)
        raise SystemExit(CoterieError.exit_code) from None
    except OSError as error:  # no space, no permission: it names the file
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(CoterieError.exit_code) from None
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        raise SystemExit(130) from None


def _show_warning(message: Warning | str, category: type[Warning], *where: object, **more: object) -> None:
    """A warning of ours is one line on stderr; those of libraries are for developers."""
    if issubclass(category, CoterieWarning):
        print(f"warning: {message}", file=sys.stderr)


@app.command()
def demo(
    serve: Annotated[bool, typer.Option(help="Serve the bundle at the end.")] = True,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the numbers to this file.")] = None,
    folder: Annotated[Path, typer.Option("--dir", help="Where everything is written.")] = Path("coterie-demo"),
    port: Port = 3000,
) -> None:
    """Walk the whole road on scikit-learn's handwritten digits: train, export, evaluate, enrol, serve.

    Example: coterie demo --no-serve --json demo.json
    """
    from coterie_cli.demo import run_demo

    run_demo(folder, serve=serve, json_file=json_file, port=port)


@app.command()
def train(
    data: Data,
    recipe: Annotated[str, typer.Option(help="A recipe's name, or a YAML file.")],
    out: Annotated[Path, typer.Option(help="The run directory to write.")],
    settings: Annotated[list[str] | None, typer.Option("--set", help="Replace a value: optimizer.lr=0.3")] = None,
    group: Group = None,
    wandb: Annotated[
        str | None, typer.Option(help="Also report to this project of Weights & Biases.", show_default=False)
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out.")] = False,
    strict: Strict = False,
) -> None:
    """Train an encoder with supervised contrastive learning.

    Example: coterie train photos/train --recipe photos-cpu --out runs/photos

    On several GPUs: torchrun --nproc-per-node=4 -m coterie_cli train photos/train --recipe … --out …
    """
    from training.distributed import is_first_rank
    from training.pretrain import train as train_run
    from training.recipe import load_recipe

    chosen = load_recipe(recipe, settings or [])
    run, images = train_run(data, chosen, out, group=group, wandb=wandb, resume=resume, strict=strict)
    if not is_first_rank():
        return
    last = run.metrics()[-1]
    show_rejected(images.rejected)
    console.print(
        f"Trained on {len(images):,} images of {len(images.classes)} classes; "
        f"k-NN top-1 on those held out {last['knn_top1']:.4f}. Run: [bold]{out}[/]"
    )


@app.command()
def probe(
    run: Annotated[Path, typer.Argument(help="A finished run directory.", show_default=False)],
    data: Data,
    test: Annotated[
        Path | None,
        typer.Option(
            help="Evaluate on these, in the forms of DATA, instead of what the run held out.", show_default=False
        ),
    ] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="Replace a value: epochs=10")] = None,
    strict: Strict = False,
) -> None:
    """Train a linear classifier on a run's frozen encoder, stage 2 of SupCon, and measure it.

    Example: coterie probe runs/photos photos/train --set augment=false
    """
    from training.probe import probe as probe_run
    from training.probe import probe_settings
    from training.run import Run

    opened = Run.open(run)
    result = probe_run(opened, data, probe_settings(opened, settings or []), test=test, strict=strict)
    show_rejected(result.rejected)
    top5 = "" if result.top5 is None else f", top-5 {result.top5:.4f}"
    console.print(f"Linear top-1 {result.top1:.4f}{top5} on {result.images:,} images, in {result.seconds:.0f} s.")


@app.command()
def export(
    gallery: Annotated[Path, typer.Option(help=f"Labelled images: {FORMS}.")],
    run: Annotated[Path | None, typer.Argument(help="A finished run directory.", show_default=False)] = None,
    encoder: Annotated[
        str | None,
        typer.Option(help="Instead of a run: timm:NAME, or resnet18, 34, 50, 101, 152, 200.", show_default=False),
    ] = None,
    weights: Annotated[
        Path | None,
        typer.Option(help="Of --encoder: a .safetensors, .pt or .pth file; else timm's hub.", show_default=False),
    ] = None,
    input_size: Annotated[
        int | None, typer.Option(help="Of --encoder: height and width; else timm's own.", min=8, show_default=False)
    ] = None,
    out: Annotated[Path, typer.Option(help="The bundle directory to write.")] = Path("bundle"),
    precision: Annotated[Literal["fp32", "fp16", "int8"], typer.Option(help="What the model computes in.")] = "fp32",
    name: Annotated[
        str | None, typer.Option(help="Name of the gallery; by default the recipe's or encoder's.", show_default=False)
    ] = None,
    group: Group = None,
    push: Annotated[bool, typer.Option(help="Also put the bundle into the BentoML model store.")] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the bundle in --out.")] = False,
    strict: Strict = False,
) -> None:
    """Package a run, or an encoder of timm, and its gallery as a bundle, checked against the torch encoder.

    Example: coterie export runs/photos --gallery photos/train --out bundles/photos

    Or: coterie export --encoder timm:convnext_tiny --gallery photos/train --out bundles/photos --precision int8
    """
    if (run is None) == (encoder is None):
        raise CoterieError("export needs one of a run and --encoder: coterie export RUN …, or --encoder timm:NAME …")
    if encoder is None and (weights or input_size):
        raise CoterieError("--weights and --input-size belong to --encoder: a run brings its own")
    from export.package import export_bundle
    from export.precision import Precision
    from export.source import pretrained_source, run_source
    from training.run import Run

    source = run_source(Run.open(run)) if run else pretrained_source(encoder, weights=weights, input_size=input_size)
    result = export_bundle(
        source,
        gallery,
        out,
        name=name,
        group=group,
        precision=Precision(precision),
        overwrite=overwrite,
        strict=strict,
    )
    show_rejected(result.images.rejected)
    manifest = result.bundle.manifest
    console.print(
        f"Parity with torch: cosine {result.parity:.7f}. Top-1 on {int(manifest.accuracy['held_out_images'])} held-out "
        f"images {manifest.accuracy['held_out_top1']:.4f}. Bundle: [bold]{out}[/]"
    )
    if push:
        push_bundle(out)


@app.command()
def embed(
    bundle: BundlePath,
    data: Annotated[
        Path,
        typer.Argument(
            help="Images, labelled or not: a folder, or a .csv or .parquet file with a row for each image.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option(help="The Parquet file to write.")],
    workers: Annotated[
        int | None,
        typer.Option(
            help="Processes that decode, by default one for each processor; 0 decodes in this one.",
            min=0,
            show_default=False,
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Throw away what an unfinished run left.")] = False,
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Embed any number of images into a Parquet file; the same command again goes on where it was stopped.

    Example: coterie embed bundles/photos photos/all --out photos.parquet
    """
    from coterie.decoding import load_ahead

    load_ahead()
    from coterie.embedding import embed_images

    done = embed_images(
        bundle, data, out, device=device, threads=threads, workers=workers, overwrite=overwrite, restart=restart
    )
    if done.rejected:
        print(f"{done.rejected:,} images were left out: {done.rejects} has the reasons", file=sys.stderr)
    console.print(f"Embedded {done.images:,} images in {done.dim} dimensions: [bold]{done.file}[/]")


app.command()(evaluate)
app.command()(sweep)


def _more(variable: str, text: str) -> Any:
    return typer.Option(envvar=variable, help=text, show_default=False)


@app.command()
def serve(
    bundle: BundlePath,
    port: Port = 3000,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    state: Annotated[Path | None, typer.Option(envvar="COTERIE_STATE", help="Where enrolled classes are kept.")] = None,
    bundles: Annotated[
        Path | None,
        typer.Option(
            envvar="COTERIE_BUNDLES",
            help="Folder below which POST /v1/bundle may name bundles by path.",
            show_default=False,
        ),
    ] = None,
    device: Device = "auto",
    threads: Threads = None,
    workers: Annotated[int | None, _more("COTERIE_WORKERS", "Processes that serve; in containers one.")] = None,
    keys: KeyFile = None,
    hosts: Annotated[list[str] | None, _more("COTERIE_HOSTS", "Further names of this machine.")] = None,
    cors: Annotated[list[str] | None, _more("COTERIE_CORS", "Origins of pages that browsers let in.")] = None,
    allow_urls: Annotated[list[str] | None, _more("COTERIE_ALLOW_URLS", "Hosts that images are fetched from.")] = None,
    max_body: Annotated[int | None, _more("COTERIE_MAX_BODY", "Bytes of a request.")] = None,
    bodies_bytes: Annotated[int | None, _more("COTERIE_BODIES_BYTES", "Bytes of all requests of a worker.")] = None,
    max_images: Annotated[int | None, _more("COTERIE_MAX_IMAGES", "Images of a request.")] = None,
    max_pixels: Annotated[int | None, _more("COTERIE_MAX_PIXELS", "Pixels of an image.")] = None,
    body_seconds: Annotated[int | None, _more("COTERIE_BODY_SECONDS", "For a request to arrive.")] = None,
    answer_seconds: Annotated[int | None, _more("COTERIE_ANSWER_SECONDS", "For its answer, from then on.")] = None,
    index_milliseconds: Annotated[
        int | None, _more("COTERIE_INDEX_MILLISECONDS", "For a search, before it becomes approximate.")
    ] = None,
    index_memory: Annotated[int | None, _more("COTERIE_INDEX_MEMORY", "Bytes of such an index.")] = None,
    request_log: Annotated[bool, typer.Option(envvar="COTERIE_REQUEST_LOG", help="A line for each request.")] = True,
    otel: Annotated[
        bool | None, typer.Option(envvar="COTERIE_OTEL", help="Trace requests.", show_default=False)
    ] = None,
) -> None:
    """Serve a bundle over HTTP; the same service as `bentoml serve`.

    Example: coterie serve bundles/photos --port 3000
    """
    from coterie_cli.serve import serve_bundle

    more = {
        "COTERIE_WORKERS": workers,
        "COTERIE_KEYS": keys and keys.resolve(),
        "COTERIE_HOSTS": hosts and " ".join(hosts),
        "COTERIE_CORS": cors and " ".join(cors),
        "COTERIE_ALLOW_URLS": allow_urls and " ".join(allow_urls),
        "COTERIE_MAX_BODY": max_body,
        "COTERIE_BODIES_BYTES": bodies_bytes,
        "COTERIE_MAX_IMAGES": max_images,
        "COTERIE_MAX_PIXELS": max_pixels,
        "COTERIE_BODY_SECONDS": body_seconds,
        "COTERIE_ANSWER_SECONDS": answer_seconds,
        "COTERIE_INDEX_MILLISECONDS": index_milliseconds,
        "COTERIE_INDEX_MEMORY": index_memory,
        "COTERIE_REQUEST_LOG": int(request_log),
        "COTERIE_OTEL": None if otel is None else int(otel),
    }
    serve_bundle(bundle, host=host, port=port, state=state, bundles=bundles, device=device, threads=threads, more=more)


@app.command()
def enroll(
    data: Annotated[
        Path,
        typer.Argument(help=f"Images: {FORMS}; or, with --label, any folder or an image file.", show_default=False),
    ],
    url: Annotated[str, typer.Option(help="Address of the service, such as http://127.0.0.1:3000.")],
    label: Annotated[str | None, typer.Option(help="The class of all of them.", show_default=False)] = None,
    key: Annotated[
        str | None, typer.Option(envvar="COTERIE_KEY", help="An API key of the service.", show_default=False)
    ] = None,
    rejects: Annotated[
        Path | None,
        typer.Option(help="Where images left out are listed; else DATA.rejects.csv beside it.", show_default=False),
    ] = None,
) -> None:
    """Enrol images in a running service; the same command again goes on where it was stopped.

    Example: coterie enroll new/boots --url http://127.0.0.1:3000 --label boot
    """
    from coterie_cli.enroll import enroll_data

    enroll_data(data, url, key=key, label=label, rejects=rejects)
