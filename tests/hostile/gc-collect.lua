-- tries: to control the collector
-- expect: global 'collectgarbage'
collectgarbage("stop")
