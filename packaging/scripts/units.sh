  units=$(systemctl list-units --plain --no-legend --state=active,activating,reloading,deactivating \
    xerotier-xim-agent.service 'xerotier-xim-agent@*.service' | cut -d ' ' -f 1)
