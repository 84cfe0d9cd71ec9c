-- tries: to switch warnings on
-- expect: global 'warn'
warn("@on")
