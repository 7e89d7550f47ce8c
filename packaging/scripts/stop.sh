if [ -d /run/systemd/system ]; then
@units.sh@
  for unit in $units; do
    echo "$unit stops when the requests that run are answered"
  done
  # shellcheck disable=SC2086 # several names
  if [ -n "$units" ]; then systemctl stop $units; fi
fi
if command -v systemctl >/dev/null; then
  systemctl --quiet --no-reload disable xerotier-xim-agent.service xerotier-xim-agent@.service
fi
