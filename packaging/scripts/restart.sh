# Not waited for: a drain may take as long as the administrator has set. An agent whose files were replaced can still
# answer its requests and end, not start another engine.
if [ -d /run/systemd/system ]; then
  systemctl daemon-reload
@units.sh@
  for unit in $units; do
    if @MAY_RESTART@; then
      echo "$unit restarts when the requests that run are answered"
      systemctl --no-block try-restart "$unit"
    else
      echo "$unit runs on in the old version because policy-rc.d says so; restart it soon" >&2
    fi
  done
fi
