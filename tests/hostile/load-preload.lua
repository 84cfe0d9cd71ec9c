-- tries: modules that are loaded already
-- expect: global 'package'
package.loaded.os.execute("touch escaped")
