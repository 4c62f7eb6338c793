#!/usr/bin/env bash
# Opens an issue with this title, or adds this run to the one that is open.
set -euo pipefail
title=$1
export GH_REPO=$GITHUB_REPOSITORY
run="$GITHUB_SERVER_URL/$GITHUB_REPOSITORY/actions/runs/$GITHUB_RUN_ID"
open=$(gh issue list --state open --limit 500 --json number,title |
  python3 -c 'import json, sys; [print(i["number"]) for i in json.load(sys.stdin) if i["title"] == sys.argv[1]]' "$title" |
  head -n 1)
if [ -n "$open" ]; then
  gh issue comment "$open" --body "Again: $run"
else
  gh issue create --title "$title" --body "Workflow \"$GITHUB_WORKFLOW\": $run"
fi
