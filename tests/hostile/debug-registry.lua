-- tries: the registry
-- expect: global 'debug'
debug.getregistry()._LOADED.os.exit()
