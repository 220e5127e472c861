package server

// AccessOf lets tests be somebody else's callers without being root.
func AccessOf(uid, gid int) Access { return Access{uid: uid, gid: gid} }
