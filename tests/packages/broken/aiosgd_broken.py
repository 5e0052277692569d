"""What a plugin must not do."""

raise SystemExit("this plugin has had enough")
