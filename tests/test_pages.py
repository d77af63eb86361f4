"""The pages for users: every command is run by a test or marked as not run, and every link leads somewhere.

A new page needs no more than tests that ask `pages.block` for its blocks.
"""

import ast
import json
import os
import re
import signal
from functools import cache
from pathlib import Path

import boto3
import pages
import pytest
import servers
from conftest import awaited, unavailable
from pages import PAGES, ROOT, block, run, started

from aaae_dist.commands import COMMANDS

ELSEWHERE = {  # words of blocks that are run, though no test asks for them by `block`
    "README.md": ["make demo\n", "make test\n", "sbatch "],  # whose script is run; what .ci/run runs
    "docs/slurm.md": ["sbatch "],  # test_slurm gives all these lines to SLURM
}
FENCES = {"bash", "json", ""}  # commands; files; what is printed
SECRET = "hunter2"


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    return pages.workplace(tmp_path)


# --- what the pages say


@cache
def asked_for() -> list[tuple[str, str]]:
    """Page and text of every call of `block` in the tests."""
    found = []
    for file in Path(__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "block":
                page, text = map(ast.literal_eval, node.args)
                found.append((page, text))
    return found


@pytest.mark.parametrize("page", PAGES)
def test_every_block_is_run_or_says_that_it_is_not(page):
    known = [text for of, text in asked_for() if of == page] + ELSEWHERE.get(page, [])
    forgotten = [
        found.text for found in pages.blocks(page) if not found.marked and not any(map(found.text.count, known))
    ]
    assert forgotten == []


@pytest.mark.parametrize("page", PAGES)
def test_commands_stand_in_blocks_of_one_kind(page):
    assert set(re.findall(r"^```(.*)\n(?:(?!```).*\n)*```$", pages.read(page), flags=re.M)) <= FENCES


def test_every_page_is_linked_from_the_first():
    first = pages.read("README.md")
    assert [page for page in PAGES[1:] if f"]({page}" not in first] == []


def test_a_block_is_marked_by_the_line_before_it(monkeypatch):
    page = "one, **not run** here:\n\n```bash\na\n```\n\n**Not run**\n\ntwo\n\n```bash\nb\n```\n"
    monkeypatch.setattr(pages, "read", lambda _: page)
    assert pages.blocks("page") == [("a\n", True), ("b\n", False)]


def test_what_is_run_elsewhere_is():
    assert "launch/demo.sh $(BIN)" in pages.read("Makefile")
    assert "make test" in pages.read(".ci/run")


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", pages.read(page)):
        path, _, heading = target.partition("#")
        place = (ROOT / page).parent / path if path else ROOT / page
        assert place.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.+)$", place.read_text(), flags=re.M)
            assert heading in [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles], target


@pytest.mark.parametrize("page", PAGES)
def test_verbs_of_aaae_that_a_page_names_are_there(page):
    for words in re.findall(r"`aaae ([a-z][a-z -]*)", pages.read(page)):
        verbs = {words.split()[0], " ".join(words.split()[:2])}
        assert verbs & {*COMMANDS, "shards", "checkpoint", "track"}, words


# --- on one machine


def test_a_laptop_trains_is_stopped_and_goes_on(workplace):
    endless = pages.SHORT.replace("images=128", "images=100_000_000") + " logging.every=320 tracking.mlflow=false"
    journal = workplace / "runs" / "digits" / "metrics.jsonl"
    with started(block("docs/laptop.md", "aaae train"), workplace, settings=endless) as first:
        awaited(lambda: journal.exists() and journal.read_text(), of=first, seconds=120)
        os.killpg(first.pid, signal.SIGINT)  # as Ctrl-C in a terminal
        out, said = first.communicate(timeout=60)
    assert first.returncode == 130, said
    assert {line.split()[0] for line in out.splitlines()[1:]} == {"ok"}, out  # of the preflight
    found = re.search(r"stopped as asked, after ([\d,]+) of", said)
    assert found, said
    more = endless.replace("100_000_000", str(int(found[1].replace(",", "")) + 64))
    said = run(block("docs/laptop.md", "launch/local.sh"), workplace, settings=more).stderr
    assert f"goes on from {found[1]} images" in said
    stands = run(block("docs/laptop.md", "aaae status"), workplace).stdout
    assert stands.startswith("runs/digits: finished, ")


# --- in a bucket


def test_a_bucket(workplace, s3, s3_variables, monkeypatch):
    """Under a profile, which also says where the store is."""
    section = """[profile lab]
        endpoint_url = {AWS_ENDPOINT_URL}
        region = {AWS_DEFAULT_REGION}
        aws_access_key_id = {AWS_ACCESS_KEY_ID}
        aws_secret_access_key = {AWS_SECRET_ACCESS_KEY}"""
    (workplace / "aws").write_text(re.sub("\n +", "\n", section.format(**s3_variables)))
    client, bucket = boto3.client("s3"), s3.removeprefix("s3://")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(workplace / "aws"))
    for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    script = block("docs/bucket.md", "aaae preflight").replace("s3://bucket", s3).replace("/scratch", "scratch")
    done = run(script, workplace, settings=f"{pages.SHORT} tracking.mlflow=false", AWS_PROFILE="lab")
    assert done.stdout.count(f"{s3}/digits: 1,628 train, 169 test images of 1 x 8 x 8 in 3 shards\n") == 2
    assert f"{s3}/runs/digits: finished, 128 of 128 images" in done.stdout
    assert f"{s3}/runs/digits: 1 checkpoints as they were saved" in done.stdout
    assert list((workplace / "scratch").rglob("*.tar"))

    rule = json.loads(re.search(r"```json\n(.*?)```", pages.read("docs/bucket.md"), flags=re.S)[1])
    client.put_bucket_lifecycle_configuration(Bucket=bucket, LifecycleConfiguration=rule)
    (kept,) = client.get_bucket_lifecycle_configuration(Bucket=bucket)["Rules"]
    assert kept["AbortIncompleteMultipartUpload"] == {"DaysAfterInitiation": 2}
    assert "Expiration" not in kept

    if not servers.ceph_is_installed():
        unavailable("Ceph is not installed, and moto has no public files")
    files = [found["Key"] for found in client.list_objects_v2(Bucket=bucket, Prefix="digits/")["Contents"]]
    for key in files:
        (workplace / key).parent.mkdir(exist_ok=True)
        client.download_file(bucket, key, str(workplace / key))
        client.put_object_acl(Bucket=bucket, Key=key, ACL="public-read")
    with servers.files(workplace) as web:
        script = block("docs/bucket.md", "AWS_NO_SIGN_REQUEST").replace("s3://bucket", s3)
        done = run(
            script.replace("https://example.org", web), workplace, AWS_ENDPOINT_URL=s3_variables["AWS_ENDPOINT_URL"]
        )
    assert done.stdout.count("digits: 1,628 train, 169 test images") == 2


# --- an MLflow server


@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated:DeprecationWarning")
def test_an_mlflow_server(workplace, s3, monkeypatch):
    """With a password that it does not ask for, to see that it is written nowhere."""
    upgrade, server = block("docs/mlflow.md", "mlflow server --host 127.0.0.1").replace("s3://bucket", s3).splitlines()
    run(upgrade, workplace)
    server = server.replace("--port 5000", f"--workers 1 --port {servers.free_port()}")
    command = ["bash", "-c", f"cd {workplace}; exec {pages.BIN}/{server}"]
    quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "DO_NOT_TRACK": "true"}
    with servers.serving(command, **quiet) as url:
        for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
        script = "aaae prepare digits --out store/digits\n" + block("docs/mlflow.md", "tracking.experiment=digits")
        person = {"MLFLOW_TRACKING_USERNAME": "me", "MLFLOW_TRACKING_PASSWORD": SECRET}
        done = run(script.replace("http://127.0.0.1:5000", url), workplace, **person)
        synced = run(block("docs/mlflow.md", "track sync"), workplace, MLFLOW_TRACKING_URI=url, **person)
        assert "MLflow has all" in synced.stdout
        from mlflow.tracking import MlflowClient

        client = MlflowClient(url)
        experiment = client.get_experiment_by_name("digits")
        found = client.search_runs([experiment.experiment_id])
        assert sorted((one.info.run_name, one.info.status) for one in found) == [
            ("first", "FINISHED"),
            ("second", "FINISHED"),
        ]
        assert "config.toml" in {file.path for file in client.list_artifacts(found[0].info.run_id)}
        written = b"".join(file.read_bytes() for file in (workplace / "runs").rglob("*") if file.is_file())
        assert SECRET not in f"{done.stdout}{done.stderr}{synced.stdout}{synced.stderr}{found}"
        assert SECRET.encode() not in written + (workplace / "mlflow.db").read_bytes()
        assert not list((workplace / "runs").glob("mlflow.db"))
