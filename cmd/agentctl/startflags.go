package main

import (
	"encoding/json"
	"fmt"
	"os"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"google.golang.org/protobuf/types/known/structpb"

	agentv1 "github.com/choiros/agent/api/choiros/agent/v1"
	"github.com/choiros/agent/internal/sandbox"
)

// startFlags are the flags of `sandbox start`.
type startFlags struct {
	file                               string
	image, machine, driver, class      string
	entrypoint, user, workdir          string
	env, data, disks, ports, secrets   []string
	cpus, memory, idle, restart        string
	pids                               uint32
	workspace                          string
	noWorkspace                        bool
	readyExec, readyHTTP, readyTimeout string
	readyTCP                           string
	secretValues, envFiles             []string
	keyless                            bool
	onSecretChange, autoForward        string
	egress                             string
	labels, options                    []string
	requestID                          string
	noWait, dryRun, startAgent         bool
}

func (f *startFlags) register(cmd *cobra.Command) {
	flags := cmd.Flags()
	flags.StringVarP(&f.file, "file", "f", "", "`file` that describes the sandbox (default ./sandbox.yaml, if there is one)")
	flags.StringVar(&f.image, "image", "", "OCI image `reference` to boot")
	flags.StringVar(&f.machine, "machine", "", "machine (a whole guest system) to boot instead, by `name`")
	flags.StringVar(&f.driver, "driver", "", "`name` of the driver that runs it (default: the agent's)")
	flags.StringVar(&f.class, "class", "", "machine class, by `name`: gives the resources not given here")
	flags.StringVar(&f.entrypoint, "entrypoint", "", "`words` that replace the image's entrypoint")
	flags.StringVarP(&f.user, "user", "u", "", "`user[:group]` inside, by name or number")
	flags.StringVarP(&f.workdir, "workdir", "w", "", "working `directory` inside")
	flags.StringArrayVarP(&f.env, "env", "e", nil, "environment variable `NAME=VALUE`, or NAME to pass yours on; not for secrets")
	flags.StringVar(&f.cpus, "cpus", "", "`number` of CPUs, such as 1.5")
	flags.StringVarP(&f.memory, "memory", "m", "", "`amount` of memory, such as 512m or 2g")
	flags.Uint32Var(&f.pids, "pids", 0, "`number` of processes and threads")
	flags.StringVar(&f.workspace, "workspace", "", "`PATH[:TARGET][:rw|ro]` to mount as workspace (default: this folder, READ-WRITE,\nat /workspace; end it in :ro to protect it)")
	flags.BoolVar(&f.noWorkspace, "no-workspace", false, "mount no workspace")
	flags.StringArrayVar(&f.data, "data", nil, "`PATH[:TARGET]` to mount as data, always writable, at /data")
	flags.StringArrayVar(&f.disks, "disk", nil, "`PATH:TARGET:SIZE` of a disk image to mount, made if there is none; for virtual machines")
	flags.StringArrayVarP(&f.ports, "port", "p", nil, "`[[BIND:]HOST:]GUEST[/udp]` port to make reachable on the host")
	flags.StringArrayVar(&f.secrets, "secret", nil, "`NAME=SOURCE[,file][,optional]` to deliver, such as KEY=env-file:PATH")
	flags.StringArrayVar(&f.secretValues, "secret-value", nil, "`NAME` of a secret whose value is asked for, or read from stdin (of several: a line each)")
	flags.StringArrayVar(&f.envFiles, "env-file", nil, "`PATH` of a file of NAME=VALUE lines, all delivered as secrets")
	flags.BoolVar(&f.keyless, "keyless", false, "refuse secrets and environment that are named like providers' keys")
	flags.StringVar(&f.onSecretChange, "on-secret-change", "", "`what` becomes of the workload: leave, signal[:HUP] or restart (default leave)")
	flags.StringVar(&f.autoForward, "auto-forward", "", "`what` becomes of ports found inside: off, offer or forward (default offer)")
	flags.StringVar(&f.egress, "egress", "", "`policy` on what it may connect to: allow, deny, or\nNAME_OR_CIDR[:PORTS][/tcp|udp],...; also deny-private")
	flags.StringVar(&f.readyExec, "ready-exec", "", "ready when this `command` succeeds inside")
	flags.StringVar(&f.readyHTTP, "ready-http", "", "ready when `PORT[/PATH]` answers with a status from 200 to 399")
	flags.StringVar(&f.readyTCP, "ready-tcp", "", "ready when this `port` accepts a connection")
	flags.StringVar(&f.readyTimeout, "ready-timeout", "", "`duration` to become ready in (default 45s)")
	flags.StringVar(&f.idle, "idle", "", "`duration[:stop|hibernate]` of idleness after which to stop it")
	flags.StringVar(&f.restart, "restart", "", "`policy` when it ends: never, on-failure[:N] or always[:N] (default never)")
	flags.StringArrayVarP(&f.labels, "label", "l", nil, "`KEY=VALUE` to select by")
	flags.StringArrayVar(&f.options, "option", nil, "`KEY=VALUE` that only the driver knows; the value is JSON, or plain text")
	flags.StringVar(&f.requestID, "request-id", "", "`id` under which a repeated start is the same start (default: a fresh one)")
	flags.BoolVar(&f.noWait, "no-wait", false, "return as soon as it is being started")
	flags.BoolVar(&f.startAgent, "start-agent", false, "start the agent too if none runs on this host, without asking")
	flags.BoolVar(&f.dryRun, "dry-run", false, "let the agent check everything, and make nothing")
	flags.SetNormalizeFunc(func(_ *pflag.FlagSet, name string) pflag.NormalizedName {
		if name == "publish" { // what others call it
			name = "port"
		}
		return pflag.NormalizedName(name)
	})
	cmd.MarkFlagsMutuallyExclusive("workspace", "no-workspace")
	cmd.MarkFlagsMutuallyExclusive("image", "machine")
	cmd.MarkFlagsMutuallyExclusive("ready-exec", "ready-http", "ready-tcp")
	cmd.MarkFlagsMutuallyExclusive("no-wait", "dry-run")
	must(cmd.MarkFlagFilename("file", "yaml", "yml"))
}

// define reads the file, sets the flags on top of it, and then fills in the
// defaults. asked reports whether more was asked for than a name.
func (f *startFlags) define(cmd *cobra.Command, args []string, getenv func(string) string) (d *definition, asked bool, err error) {
	cwd, err := os.Getwd()
	if err != nil {
		return nil, false, err
	}
	file := f.file
	if file == "" && exists(specFileName) {
		file = specFileName
	}
	d = newDefinition(cwd)
	if file != "" {
		if d, err = readSpecFile(file, getenv("HOME")); err != nil {
			return nil, false, err
		}
	}
	name, command := args, []string(nil)
	if dash := cmd.ArgsLenAtDash(); dash >= 0 {
		name, command = args[:dash], args[dash:]
	}
	if len(command) > 0 {
		d.spec.Command = command
	}
	changed, err := f.apply(cmd, d, paths{base: cwd}, getenv)
	if err != nil {
		return nil, false, err
	}
	if len(name) > 0 {
		d.name = name[0]
	}
	if d.name == "" {
		d.name = folderName(d.folder)
	}
	if d.name == "" {
		return nil, false, withHint(sandbox.Invalidf("NAME", "cannot be made of the folder's, %s", d.folder), "agentctl sandbox start NAME")
	}
	return d, file != "" || changed || len(command) > 0, nil
}

// setter sets what one flag says.
type setter struct {
	flag   string
	values []string
	set    func(string) error
}

// secretSetters are those of secrets and of what guards them.
func (f *startFlags) secretSetters(d *definition, p paths) []setter {
	spec := d.spec
	return []setter{
		{"secret", f.secrets, setting(func(s string) (*agentv1.SecretRef, error) { return parseSecret(s, p) }, d.addSecret)},
		{"env-file", f.envFiles, setting(func(s string) (string, error) { return p.secretSource("env-file:" + s) }, func(source string) {
			d.addSecret(&agentv1.SecretRef{Name: sandbox.AllNames, Source: source})
		})},
		{"secret-value", f.secretValues, d.setSecretValue},
		{"keyless", []string{""}, func(string) error {
			spec.Keyless = f.keyless
			return nil
		}},
		{"on-secret-change", []string{f.onSecretChange}, setting(parseRotation, func(v *agentv1.SecretRotation) { spec.SecretRotation = v })},
		{"auto-forward", []string{f.autoForward}, setting(parseAutoForward, func(v agentv1.AutoForward_Mode) { d.autoForward().Mode = v })},
	}
}

// apply sets the flags that were given. changed reports whether any was.
func (f *startFlags) apply(cmd *cobra.Command, d *definition, p paths, getenv func(string) string) (changed bool, err error) {
	spec := d.spec
	mount := func(kind agentv1.Mount_Kind, use func(*agentv1.Mount)) func(string) error {
		return func(s string) error {
			m, err := parseMount(kind, s, p)
			if err == nil {
				use(m)
			}
			return err
		}
	}
	setters := append(f.secretSetters(d, p), []setter{
		{"image", []string{f.image}, plainly(d.setImage)},
		{"machine", []string{f.machine}, plainly(d.setMachine)},
		{"driver", []string{f.driver}, plainly(func(s string) { spec.Driver = s })},
		{"class", []string{f.class}, plainly(func(s string) { spec.MachineClass = s })},
		{"entrypoint", []string{f.entrypoint}, setting(parseWords, func(v []string) { spec.Entrypoint = v })},
		{"user", []string{f.user}, plainly(func(s string) { spec.User = s })},
		{"workdir", []string{f.workdir}, plainly(func(s string) { spec.WorkingDir = s })},
		{"env", f.env, func(s string) error { return setEnv(spec.Env, s, getenv) }},
		{"cpus", []string{f.cpus}, setting(parseCPUs, func(v uint32) { d.resources().CpuMillis = v })},
		{"memory", []string{f.memory}, setting(parseMemory, func(v uint64) { d.resources().MemoryMib = v })},
		{"pids", []string{fmt.Sprint(f.pids)}, setting(parseCount, func(v uint32) { d.resources().Pids = v })},
		{"workspace", []string{f.workspace}, mount(agentv1.Mount_KIND_WORKSPACE, d.setWorkspace)},
		{"no-workspace", []string{""}, func(string) error {
			if f.noWorkspace {
				d.setWorkspace(nil)
			}
			return nil
		}},
		{"data", f.data, mount(agentv1.Mount_KIND_DATA, d.addMount)},
		{"disk", f.disks, setting(func(s string) (*agentv1.Mount, error) { return parseDisk(s, p) }, d.addMount)},
		{"egress", []string{f.egress}, setting(parseEgress, func(v *agentv1.Egress) { spec.Egress = v })},
		{"port", f.ports, setting(parsePort, d.addPort)},
		{"ready-exec", []string{f.readyExec}, setting(parseWords, func(v []string) {
			d.readiness().Probe = &agentv1.Readiness_Exec{Exec: &agentv1.ExecProbe{Command: v}}
		})},
		{"ready-http", []string{f.readyHTTP}, setting(parseHTTP, func(v *agentv1.HttpProbe) {
			d.readiness().Probe = &agentv1.Readiness_Http{Http: v}
		})},
		{"ready-tcp", []string{f.readyTCP}, setting(func(s string) (uint32, error) { return parsePortNumber(s, 1) }, func(v uint32) {
			d.readiness().Probe = &agentv1.Readiness_Tcp{Tcp: &agentv1.TcpProbe{Port: v}}
		})},
		{"ready-timeout", []string{f.readyTimeout}, func(s string) error {
			timeout, err := positive(s)
			d.readiness().Timeout = timeout
			return err
		}},
		{"idle", []string{f.idle}, setting(parseIdle, func(v *agentv1.IdlePolicy) { spec.Idle = v })},
		{"restart", []string{f.restart}, setting(parseRestart, func(v *agentv1.RestartPolicy) { spec.Restart = v })},
		{"label", f.labels, func(s string) error { return setPair(d.labels, s) }},
		{"option", f.options, func(s string) error { return setOption(d, s) }},
	}...)
	for _, s := range setters {
		if !cmd.Flags().Changed(s.flag) {
			continue
		}
		changed = true
		for _, value := range s.values {
			if err := s.set(value); err != nil {
				return changed, usagef(cmd, "--%s: %s", s.flag, err)
			}
		}
	}
	return changed, nil
}

// plainly makes a setter of text that may not be empty.
func plainly(set func(string)) func(string) error { return setting(nonEmpty, set) }

func setting[T any](parse func(string) (T, error), set func(T)) func(string) error {
	return func(s string) error {
		v, err := parse(s)
		if err == nil {
			set(v)
		}
		return err
	}
}

func setPair(to map[string]string, s string) error {
	key, value, found := strings.Cut(s, "=")
	if !found || key == "" {
		return fmt.Errorf("%q is not of the form KEY=VALUE", s)
	}
	to[key] = value
	return nil
}

// setEnv sets NAME=VALUE, or NAME to the value it has here. It does not echo
// the value.
func setEnv(to map[string]string, s string, getenv func(string) string) error {
	name, value, found := strings.Cut(s, "=")
	if name == "" {
		return fmt.Errorf("is not of the form NAME=VALUE")
	}
	if !found {
		if value = getenv(name); value == "" {
			return fmt.Errorf("%s is not set here; write %s=VALUE", name, name)
		}
	}
	to[name] = value
	return nil
}

// setOption sets KEY=VALUE for the driver; what is not JSON is text.
func setOption(d *definition, s string) error {
	key, text, found := strings.Cut(s, "=")
	if !found || key == "" {
		return fmt.Errorf("%q is not of the form KEY=VALUE", s)
	}
	var value any
	if json.Unmarshal([]byte(text), &value) != nil {
		value = text
	}
	v, err := structpb.NewValue(value)
	if err != nil {
		return err
	}
	d.setOption(key, v)
	return nil
}

// complete fills in the default workspace. It refuses a folder that nobody can
// mean to hand over.
func (d *definition) complete(home string) error {
	if d.workspaceChosen {
		return nil
	}
	if d.folder == "/" || home != "" && d.folder == strings.TrimRight(home, "/") {
		return withHint(sandbox.Invalidf("--workspace", "the default, %s, is too much to hand to a sandbox", d.folder),
			"name a folder with --workspace PATH, or give --no-workspace")
	}
	m, err := newMount(agentv1.Mount_KIND_WORKSPACE, d.folder, "", false, paths{})
	d.setWorkspace(m)
	return err
}

// message is the definition as the API takes it.
func (d *definition) message() *agentv1.Sandbox {
	return &agentv1.Sandbox{Name: d.name, Labels: d.labels, Spec: d.spec}
}
