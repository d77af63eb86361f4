"""Real servers for the tests: processes of their own on free ports of 127.0.0.1, ended with their `with` block."""

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import boto3

ANYTHING = {"Version": "2012-10-17", "Statement": {"Effect": "Allow", "Action": "*", "Resource": "*"}}


@contextmanager
def serving(command: Sequence[str], **variables: str) -> Iterator[str]:
    """Run a server until the block ends; its URL, taken from what it says on stderr once it listens."""
    with subprocess.Popen(command, env=os.environ | variables, stderr=subprocess.PIPE, text=True) as process:
        said = process.stderr
        assert said
        try:
            url = next(filter(None, (re.search(r"http://127\.0\.0\.1:\d+", line) for line in said)), None)
            assert url, f"{command} ended with {process.wait()}"
            threading.Thread(target=said.read, daemon=True).start()  # a full pipe would stop it
            yield url[0]
        finally:
            process.terminate()
            process.wait()


@contextmanager
def s3_server() -> Iterator[dict[str, str]]:
    """An S3 store that checks every signature and knows one user; the variables with which a client reaches it."""
    moto = [sys.executable, "-u", "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
    with serving(moto, INITIAL_NO_AUTH_ACTION_COUNT="3") as url:  # the three that make the user
        iam = boto3.client(
            "iam", endpoint_url=url, region_name="us-east-1", aws_access_key_id="-", aws_secret_access_key="-"
        )
        iam.create_user(UserName="tester")
        iam.put_user_policy(UserName="tester", PolicyName="anything", PolicyDocument=json.dumps(ANYTHING))
        key = iam.create_access_key(UserName="tester")["AccessKey"]
        yield {
            "AWS_ENDPOINT_URL": url,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": key["AccessKeyId"],
            "AWS_SECRET_ACCESS_KEY": key["SecretAccessKey"],
        }
