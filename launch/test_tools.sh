#!/usr/bin/env bash
# Installs the real counterparts that some slow tests talk to: a browser, DICOM and FHIR validators, a PACS, R, and
# clients of the API for JavaScript. `.ci/run` calls it. Each is optional: a test without its own is skipped, by name.
#   bash launch/test_tools.sh
set -uo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

# Debian and its descendants; elsewhere install them by hand.
packages=(chromium dicom3tools dcmtk espeak-ng fonts-dejavu-core orthanc orthanc-dicomweb postgresql
    r-base-core r-cran-lme4 r-cran-lmertest r-cran-ordinal)
wanted=()
for package in "${packages[@]}"; do
    dpkg -s "$package" >/dev/null 2>&1 || wanted+=("$package")
done
if [ "${#wanted[@]}" -gt 0 ]; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        echo "installing ${wanted[*]} (a few minutes)" >&2
        export DEBIAN_FRONTEND=noninteractive
        # Services that Debian starts would listen beside the tests.
        policy=/usr/sbin/policy-rc.d
        [ -e "$policy" ] || { printf '#!/bin/sh\nexit 101\n' >"$policy" && chmod +x "$policy" && made_policy=1; }
        { apt-get update -qq && apt-get install -y -qq --no-install-recommends "${wanted[@]}"; } >/dev/null 2>&1 ||
            echo "warning: not all of these could be installed: ${wanted[*]}" >&2
        [ -z "${made_policy:-}" ] || rm -f "$policy"
    else
        echo "warning: missing, and tests that need them are skipped: ${wanted[*]}" >&2
    fi
fi

# What npm brings lies beside the environments of Python, and out of the tree's history.
if command -v npm >/dev/null && ! cmp -s "$root/tests/npm/package.json" "$root/.node-tools/package.json"; then
    mkdir -p "$root/.node-tools" && cp "$root/tests/npm/package.json" "$root/.node-tools/"
    (cd "$root/.node-tools" && npm install --silent --no-audit --no-fund --no-package-lock >/dev/null 2>&1) || {
        rm -rf "$root/.node-tools"
        echo "warning: npm could not install tests/npm/package.json; tests that need it are skipped" >&2
    }
fi
exit 0
